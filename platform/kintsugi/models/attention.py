"""Channel attention (Woo et al., "CBAM", ECCV 2018) and the mask attention of the published recipe."""

import torch
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """Scale each channel by a weight in (0, 1) from its average and its maximum over the image.

    Average and maximum pass one shared two-layer perceptron with `channels // reduction` hidden units.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        return features * torch.sigmoid(self.mlp(self.avg_pool(features)) + self.mlp(self.max_pool(features)))


class MaskAttention(nn.Sequential):
    """From a defect mask (N, 1, H, W) to a weight map in (0, 1) of the same shape."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(64, 1, 1), nn.Sigmoid())
