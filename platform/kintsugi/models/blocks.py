"""Blocks of the UNet. Each takes and gives (N, C, H, W) of one resolution."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kintsugi.models.attention import ChannelAttention, SpatialAttention
from kintsugi.sections import ModelConfig


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of an (N, C, H, W) batch.

    timm's is the same, and importing timm costs every process of a cluster several seconds.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Sequential):
    """The recipe's: two 3x3 convolutions, each with norm and ReLU, then attention and dropout."""

    def __init__(self, before: int, after: int, config: ModelConfig, level: int) -> None:
        super().__init__(
            conv3x3(before, after, config),
            norm(after, config),
            nn.ReLU(inplace=True),
            conv3x3(after, after, config),
            norm(after, config),
            nn.ReLU(inplace=True),
            attention(after, config, level),
            nn.Dropout2d(config.dropout),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a ReLU, added to the input (Zhang et al., "DRUNet", TPAMI 2021)."""

    def __init__(self, before: int, after: int, config: ModelConfig, level: int) -> None:
        super().__init__()
        self.entry = _entry(before, after, config)
        self.body = nn.Sequential(
            norm(after, config),
            conv3x3(after, after, config),
            nn.ReLU(inplace=True),
            conv3x3(after, after, config),
            attention(after, config, level),
            nn.Dropout2d(config.dropout),
        )

    def forward(self, features: Tensor) -> Tensor:
        features = self.entry(features)
        return features + self.body(features)


class NafBlock(nn.Module):
    """NAFNet's block: depthwise convolution, gates instead of activations (Chen et al., ECCV 2022).

    Its simplified channel attention is the model's own, with the level's reduction ratio.
    """

    def __init__(self, before: int, after: int, config: ModelConfig, level: int) -> None:
        super().__init__()
        self.entry = _entry(before, after, config)
        self.mix = nn.Sequential(
            norm(after, config),
            nn.Conv2d(after, 2 * after, 1, bias=config.bias),
            nn.Conv2d(2 * after, 2 * after, 3, padding=1, groups=2 * after, bias=config.bias),
            Gate(),
            attention(after, config, level),
            nn.Conv2d(after, after, 1, bias=config.bias),
            nn.Dropout2d(config.dropout),
        )
        self.feed = nn.Sequential(
            norm(after, config),
            nn.Conv2d(after, 2 * after, 1, bias=config.bias),
            Gate(),
            nn.Conv2d(after, after, 1, bias=config.bias),
            nn.Dropout2d(config.dropout),
        )
        self.scales = nn.Parameter(torch.full((2, after, 1, 1), 0.01))

    def forward(self, features: Tensor) -> Tensor:
        features = self.entry(features)
        features = features + self.scales[0] * self.mix(features)
        return features + self.scales[1] * self.feed(features)


class Gate(nn.Module):
    """The product of the two halves of the channels."""

    def forward(self, features: Tensor) -> Tensor:
        first, second = features.chunk(2, 1)
        return first * second


class Off(nn.Module):
    """No skip."""

    def forward(self, features: Tensor, skipped: Tensor) -> Tensor:
        return features


class Concat(nn.Module):
    """The encoder's features as further channels."""

    def forward(self, features: Tensor, skipped: Tensor) -> Tensor:
        return torch.cat([features, skipped], 1)


class Add(nn.Module):
    """The encoder's features added."""

    def forward(self, features: Tensor, skipped: Tensor) -> Tensor:
        return features + skipped


class GatedSkip(nn.Module):
    """A skip that passes CBAM's channel and spatial attention before it is added."""

    def __init__(self, channels: int, config: ModelConfig, level: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(_channel_attention(channels, config, level), SpatialAttention())

    def forward(self, features: Tensor, skipped: Tensor) -> Tensor:
        return features + self.gate(skipped)


class Upsample(nn.Module):
    """Twice the size: bilinear and a 3x3 convolution, or a 1x1 convolution and PixelShuffle.

    Transposed convolutions draw checkerboards (Odena et al., Distill 2016).
    """

    def __init__(self, before: int, after: int, config: ModelConfig) -> None:
        super().__init__()
        self.shuffle = config.upsample == "shuffle"
        self.conv = (
            nn.Conv2d(before, 4 * after, 1, bias=config.bias) if self.shuffle else conv3x3(before, after, config)
        )

    def forward(self, features: Tensor) -> Tensor:
        if self.shuffle:
            return F.pixel_shuffle(self.conv(features), 2)
        return self.conv(F.interpolate(features, scale_factor=2.0, mode="bilinear", align_corners=False))


BLOCKS: dict[str, Callable[[int, int, ModelConfig, int], nn.Module]] = {
    "conv": ConvBlock,
    "residual": ResidualBlock,
    "naf": NafBlock,
}


def stage(before: int, after: int, config: ModelConfig, level: int) -> nn.Sequential:
    """The blocks of one level; the first takes `before` channels."""
    block, count = BLOCKS[config.block], config.blocks[level]
    return nn.Sequential(*(block(before if i == 0 else after, after, config, level) for i in range(count)))


def downsample(channels: int, config: ModelConfig) -> nn.Module:
    """Half the size: the maximum of 2x2, or a strided 2x2 convolution."""
    return nn.MaxPool2d(2) if config.downsample == "max" else nn.Conv2d(channels, channels, 2, 2, bias=config.bias)


def conv3x3(before: int, after: int, config: ModelConfig) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=config.bias)


def norm(channels: int, config: ModelConfig) -> nn.Module:
    """None of them depends on the batch: with BatchNorm two workers would differ from one."""
    if config.norm == "layer":
        return LayerNorm2d(channels, bias=config.bias)
    return nn.GroupNorm(_groups(channels), channels) if config.norm == "group" else nn.Identity()


def attention(channels: int, config: ModelConfig, level: int) -> nn.Module:
    if config.attention == "none":
        return nn.Identity()
    channel = _channel_attention(channels, config, level)
    return channel if config.attention == "channel" else nn.Sequential(channel, SpatialAttention())


def _channel_attention(channels: int, config: ModelConfig, level: int) -> ChannelAttention:
    window, reduction = config.attention_window, config.reduction[min(level, config.levels - 1)]
    return ChannelAttention(channels, reduction, window // (config.stem * 2**level) if window else None)


def _groups(channels: int) -> int:
    return next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)


def _entry(before: int, after: int, config: ModelConfig) -> nn.Module:
    return nn.Identity() if before == after else conv3x3(before, after, config)
