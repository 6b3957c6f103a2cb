"""Perceptual distance on VGG features (Johnson et al., ECCV 2016)."""

from collections.abc import Callable
from pathlib import Path
from typing import cast
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kintsugi.errors import ConfigError
from kintsugi.sections import PerceptualConfig

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerceptualDistance(nn.Module):
    """Mean absolute difference of two images' VGG features, averaged over the chosen layers.

    With `weights: random` the features are those of a seeded untrained network: a mild structural loss
    (Liu et al., CVPR 2021, arXiv 2103.10571), not a measure of perceived quality.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__()
        layers = _load_features(config)
        self.chosen = frozenset(config.layers)
        # ReLU in place would overwrite the features that are compared.
        self.layers = nn.Sequential(
            *(nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in layers[: max(config.layers) + 1])
        ).eval()
        self.layers.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Distance of two (N, 1 or 3, H, W) batches in [0, 1], a scalar."""
        features, wanted = self._prepare(output), self._prepare(target)
        total = output.new_zeros(())
        for index, layer in enumerate(self.layers):
            features = layer(features)
            with torch.no_grad():
                wanted = layer(wanted)
            if index in self.chosen:
                total = total + (features - wanted).abs().mean()
        return total / len(self.chosen)

    def _prepare(self, batch: Tensor) -> Tensor:
        return (batch.expand(-1, 3, -1, -1) - self.mean) / self.std


def _load_features(config: PerceptualConfig) -> nn.Sequential:
    # Here, not above: torchvision takes seconds to import, and only training needs it.
    import torchvision

    build: Callable[..., torchvision.models.VGG] = getattr(torchvision.models, config.network)
    if config.weights == "imagenet":
        try:
            return cast(nn.Sequential, build(weights="IMAGENET1K_V1").features)
        except (URLError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"the ImageNet weights of {config.network} cannot be had ({error}): set loss.perceptual.weights to the "
                "path of a state dict, or to 'random' for a seeded untrained network"
            ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build(weights=None)
    if config.weights != "random":
        network.load_state_dict(_read_state(Path(config.weights)))
    return cast(nn.Sequential, network.features)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"loss.perceptual.weights: {path} cannot be read ({error}): give imagenet, random or a path"
        ) from error
