"""RestorationUNet: the published recipe's network, with its switches made to work."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kintsugi.config import ModelConfig
from kintsugi.models.attention import MaskAttention
from kintsugi.models.blocks import ConvBlock, Upsample


class RestorationUNet(nn.Module):
    """UNet (Ronneberger et al., MICCAI 2015) with channel attention, switchable skips and mask attention.

    Mask attention blends two output heads, one for defects and one for background: `w * defect +
    (1 - w) * background` with the weight map w made from the mask. With a single head the same formula
    would be the identity. With `mask: optional` a further input channel tells whether the mask is known,
    since zeros alone would read as "no defect".
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.base * 2**level for level in range(config.levels + 1)]
        inputs = config.channels + {"none": 0, "given": 1, "optional": 2}[config.mask]
        self.encoder = nn.ModuleList(
            ConvBlock(before, after, reduction, config.dropout)
            for before, after, reduction in zip([inputs, *widths], widths[:-1], config.reduction, strict=False)
        )
        self.bottleneck = ConvBlock(widths[-2], widths[-1], config.reduction[-1], config.dropout)
        self.upsamples = nn.ModuleList(
            Upsample(widths[level + 1], widths[level]) for level in reversed(range(config.levels))
        )
        self.decoder = nn.ModuleList(
            ConvBlock(
                widths[level] * (2 if config.skips[level] else 1),
                widths[level],
                config.reduction[level],
                config.dropout,
            )
            for level in reversed(range(config.levels))
        )
        self.background_head = _head(widths[0], config)
        if config.mask != "none":
            self.mask_attention = MaskAttention()
            self.defect_head = _head(widths[0], config)

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_known: Tensor | None = None) -> Tensor:
        """Restore a batch.

        Args:
            image: (N, C, H, W) in [0, 1], any H and W; sides are reflected up to a multiple of 2**levels
                and cut back, never resized.
            mask: (N, 1, H, W) of 0 and 1; ignored with `mask: none`.
            mask_known: (N,) of 0 and 1 with `mask: optional`; default: known where `mask` is given.

        Returns:
            (N, C, H, W), not clipped.
        """
        height, width = image.shape[-2:]
        padded, padded_mask = self._pad(image), None
        inputs = [padded]
        if self.config.mask != "none":
            known = image.new_full((len(image),), 0.0 if mask is None else 1.0) if mask_known is None else mask_known
            padded_mask = self._pad(image.new_zeros(len(image), 1, height, width) if mask is None else mask)
            inputs.append(padded_mask)
            if self.config.mask == "optional":
                inputs.append(known.view(-1, 1, 1, 1).expand_as(padded_mask))
        out = self._blend(self._features(torch.cat(inputs, 1)), padded_mask)
        return (out + padded if self.config.residual else out)[..., :height, :width]

    def _features(self, features: Tensor) -> Tensor:
        skipped: list[Tensor] = []
        for block in self.encoder:
            features = block(features)
            skipped.append(features)
            features = F.max_pool2d(features, 2)
        features = self.bottleneck(features)
        for level, upsample, block in zip(
            reversed(range(self.config.levels)), self.upsamples, self.decoder, strict=True
        ):
            features = upsample(features)
            features = block(torch.cat([features, skipped[level]], 1) if self.config.skips[level] else features)
        return features

    def _blend(self, features: Tensor, mask: Tensor | None) -> Tensor:
        background = self.background_head(features)
        if mask is None:
            return background
        weight = self.mask_attention(mask)
        return weight * self.defect_head(features) + (1 - weight) * background

    def _pad(self, batch: Tensor) -> Tensor:
        step = 2**self.config.levels
        bottom, right = -batch.shape[-2] % step, -batch.shape[-1] % step
        if not bottom and not right:
            return batch
        # Reflection needs the side to be longer than the padding.
        mode = "reflect" if bottom < batch.shape[-2] and right < batch.shape[-1] else "replicate"
        return F.pad(batch, (0, right, 0, bottom), mode=mode)


def _head(width: int, config: ModelConfig) -> nn.Conv2d:
    """The last layer; a residual model's starts at zero, so that it begins as the identity."""
    head = nn.Conv2d(width, config.channels, 1)
    if config.residual:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(cast(Tensor, head.bias))
    return head


def build_model(config: ModelConfig) -> RestorationUNet:
    return RestorationUNet(config)
