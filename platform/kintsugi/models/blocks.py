"""Convolution blocks of the UNet."""

import torch.nn.functional as F
from torch import Tensor, nn

from kintsugi.models.attention import ChannelAttention


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of an (N, C, H, W) batch.

    timm's is the same, and importing timm costs every process of a cluster several seconds.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Sequential):
    """Two 3x3 convolutions, each with LayerNorm and ReLU, then channel attention and dropout.

    LayerNorm instead of BatchNorm: its statistics depend neither on the batch nor on the number of workers.
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: int, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            LayerNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            LayerNorm2d(out_channels),
            nn.ReLU(inplace=True),
            ChannelAttention(out_channels, reduction),
            nn.Dropout2d(dropout),
        )


class Upsample(nn.Module):
    """Bilinear upsampling to a given size and a 3x3 convolution.

    Transposed convolutions draw checkerboards (Odena et al., Distill 2016).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv(F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False))
