"""RestorationUNet: the published recipe's network, with its switches made to work, and what goes beyond it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kintsugi.models.attention import MaskAttention
from kintsugi.models.blocks import Add, Concat, GatedSkip, Off, Upsample, conv3x3, stage
from kintsugi.models.encoder import build_encoder
from kintsugi.sections import ModelConfig


class Prediction(NamedTuple):
    """What the network says of a batch.

    image: (N, C, H, W), not clipped.
    defect: (N, 1, H, W) logits of a defect, with `mask: predicted`.
    error: (N, 1, H, W) bound of the absolute error, of full scale, with `error: true`.
    """

    image: Tensor
    defect: Tensor | None = None
    error: Tensor | None = None


class RestorationUNet(nn.Module):
    """UNet (Ronneberger et al., MICCAI 2015) with channel attention, switchable skips and mask attention.

    Mask attention blends two output heads, one for defects and one for background: `w * defect +
    (1 - w) * background` with the weight map w made from the mask. With a single head the same formula
    would be the identity. With `mask: optional` a further input channel tells whether the mask is known,
    since zeros alone would read as "no defect". With `mask: predicted` w is the network's own defect map,
    or the mask where one is known.

    Attributes:
        stride: px to whose multiples sides are filled up, and positions of tiles must be aligned.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stride = max(config.stem * 2**config.levels, config.attention_window or 1)
        fold = config.stem**2
        inputs = fold * (config.channels + {"given": 1, "optional": 2}.get(config.mask, 0))
        self.encoder = build_encoder(inputs, config)
        widths = self.encoder.widths
        levels = list(reversed(range(config.levels)))
        self.upsamples = nn.ModuleList(Upsample(widths[level + 1], widths[level], config) for level in levels)
        self.joins = nn.ModuleList(_join(widths[level], config, level) for level in levels)
        self.decoder = nn.ModuleList(
            stage(widths[level] * (2 if config.skips[level] == "concat" else 1), widths[level], config, level)
            for level in levels
        )
        self.background_head = _head(widths[0], config)
        if config.mask != "none":
            self.defect_head = _head(widths[0], config)
        if config.mask in ("given", "optional"):
            self.mask_attention = MaskAttention()
        if config.mask == "predicted":
            self.mask_head = _map_head(widths[0], fold)
        if config.error:
            self.error_head = _map_head(widths[0], fold)

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_known: Tensor | None = None) -> Prediction:
        """Restore a batch.

        Args:
            image: (N, C, H, W) in [0, 1], any H and W; sides are reflected up to a multiple of `stride`
                and cut back, never resized.
            mask: (N, 1, H, W) of 0 and 1; ignored with `mask: none`.
            mask_known: (N,) of 0 and 1; default: known where `mask` is given.
        """
        config, (height, width) = self.config, image.shape[-2:]
        padded = self._pad(image)
        known = image.new_full((len(image),), 0.0 if mask is None else 1.0) if mask_known is None else mask_known
        known = known.view(-1, 1, 1, 1)
        shown = self._pad(image.new_zeros(len(image), 1, height, width) if mask is None else mask)
        inputs = [padded]
        if config.mask in ("given", "optional"):
            inputs.append(shown)
        if config.mask == "optional":
            inputs.append(known.expand_as(shown))
        features = self._features(F.pixel_unshuffle(torch.cat(inputs, 1), config.stem))
        logits = self._unfold(self.mask_head(features)) if config.mask == "predicted" else None
        out = self._blend(features, shown, known, logits)
        error = F.softplus(self._unfold(self.error_head(features.detach()))) / 16 if config.error else None
        restored = out + padded if config.residual else out
        rows, columns = slice(height), slice(width)
        cut = (None if part is None else part[..., rows, columns] for part in (logits, error))
        return Prediction(restored[..., rows, columns], *cut)

    def _features(self, folded: Tensor) -> Tensor:
        *skipped, features = self.encoder(folded)
        for upsample, join, block in zip(self.upsamples, self.joins, self.decoder, strict=True):
            features = block(join(upsample(features), skipped.pop()))
        return features

    def _blend(self, features: Tensor, mask: Tensor, known: Tensor, logits: Tensor | None) -> Tensor:
        background = self._unfold(self.background_head(features))
        if self.config.mask == "none":
            return background
        if logits is not None:
            weight = known * mask + (1 - known) * torch.sigmoid(logits)
        else:
            weight = self.mask_attention(mask)
        return weight * self._unfold(self.defect_head(features)) + (1 - weight) * background

    def _unfold(self, folded: Tensor) -> Tensor:
        return F.pixel_shuffle(folded, self.config.stem)

    def _pad(self, batch: Tensor) -> Tensor:
        bottom, right = -batch.shape[-2] % self.stride, -batch.shape[-1] % self.stride
        if not bottom and not right:
            return batch
        # Reflection needs the side to be longer than the padding.
        mode = "reflect" if bottom < batch.shape[-2] and right < batch.shape[-1] else "replicate"
        return F.pad(batch, (0, right, 0, bottom), mode=mode)


def _join(width: int, config: ModelConfig, level: int) -> nn.Module:
    """How the decoder meets the encoder's features at one level."""
    kind = config.skips[level]
    return GatedSkip(width, config, level) if kind == "gated" else {"off": Off, "concat": Concat, "add": Add}[kind]()


def _head(width: int, config: ModelConfig) -> nn.Conv2d:
    """The last layer; a residual model's starts at zero, so that it begins as the identity."""
    head = conv3x3(width, config.channels * config.stem**2, config)
    if config.residual:
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    return head


def _map_head(width: int, fold: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, fold, 1))


def build_model(config: ModelConfig) -> RestorationUNet:
    return RestorationUNet(config)
