"""Channel and spatial attention (Woo et al., "CBAM", ECCV 2018) and the mask attention of the published recipe."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """Scale each channel by a weight in (0, 1) from its average and its maximum.

    Average and maximum pass one shared two-layer perceptron with `channels // reduction` hidden units.

    Args:
        cell: side, in features, of the square cells that are pooled; weights between the cells' middles are
            interpolated. None pools the whole input as the paper does: then a model that was trained on crops
            meets other statistics on whole images, and tiles of one image disagree (Chu et al., "TLC",
            ECCV 2022). Sides of the input must be multiples of it.
    """

    def __init__(self, channels: int, reduction: int = 16, cell: int | None = None) -> None:
        super().__init__()
        self.cell = cell
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        if self.cell is None:
            average, largest = features.mean((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
            return features * torch.sigmoid(self.mlp(average) + self.mlp(largest))
        average, largest = F.avg_pool2d(features, self.cell), F.max_pool2d(features, self.cell)
        weight = torch.sigmoid(self.mlp(average) + self.mlp(largest))
        return features * F.interpolate(weight, scale_factor=float(self.cell), mode="bilinear", align_corners=False)


class SpatialAttention(nn.Module):
    """Scale each position by a weight in (0, 1) from the average and the maximum over its channels."""

    def __init__(self, side: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, side, padding=side // 2, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        pooled = torch.cat([features.mean(1, keepdim=True), features.amax(1, keepdim=True)], 1)
        return features * torch.sigmoid(self.conv(pooled))


class MaskAttention(nn.Sequential):
    """From a defect mask (N, 1, H, W) to a weight map in (0, 1) of the same shape."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(64, 1, 1), nn.Sigmoid())
