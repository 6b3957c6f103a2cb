"""The half of the UNet that goes down: our own stages, or a timm model's."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kintsugi.errors import ConfigError
from kintsugi.models.blocks import downsample, stage
from kintsugi.sections import ModelConfig


class Encoder(nn.Module):
    """From the folded input to the features of every level and of the bottleneck, finest first.

    Attributes:
        widths: channels at each of the `levels + 1` resolutions.
    """

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        limit = config.max_channels or config.base * 2**config.levels
        self.widths = [min(config.base * 2**level, limit) for level in range(config.levels + 1)]
        self.stages = nn.ModuleList(
            stage(before, after, config, level)
            for level, (before, after) in enumerate(zip([inputs, *self.widths], self.widths, strict=False))
        )
        self.downsamples = nn.ModuleList(downsample(width, config) for width in self.widths[:-1])

    def forward(self, folded: Tensor) -> list[Tensor]:
        features = [self.stages[0](folded)]
        for down, block in zip(self.downsamples, list(self.stages)[1:], strict=True):
            features.append(block(down(features[-1])))
        return features


class TimmEncoder(nn.Module):
    """A timm model's features below one stage of our own at full resolution."""

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        self.first = stage(inputs, config.base, config, 0)
        self.trunk, channels = _timm_trunk(config)
        self.widths = [config.base, *channels]

    def forward(self, folded: Tensor) -> list[Tensor]:
        first = self.first(folded)
        return [first, *self.trunk(first)]


def build_encoder(inputs: int, config: ModelConfig) -> Encoder | TimmEncoder:
    return Encoder(inputs, config) if config.encoder is None else TimmEncoder(inputs, config)


def load_encoder_weights(encoder: nn.Module, config: ModelConfig) -> None:
    """Start a timm encoder from `model.encoder_weights`, a file that timm reads (.safetensors, .pth, .npz).

    Its first layer, which meets other channels here, keeps its random weights.

    Raises:
        ConfigError: the file cannot be read, or is of another model.
    """
    if config.encoder_weights is None:
        return
    from timm.models import load_state_dict

    assert isinstance(encoder, TimmEncoder)
    wanted = encoder.trunk.state_dict()
    try:
        found = load_state_dict(str(Path(config.encoder_weights)))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"model.encoder_weights={config.encoder_weights} cannot be read ({error})") from error
    fitting = {name: value for name, value in found.items() if name in wanted and value.shape == wanted[name].shape}
    if len(fitting) < 0.9 * len(wanted):
        raise ConfigError(
            f"model.encoder_weights={config.encoder_weights} fits {len(fitting)} of the {len(wanted)} tensors of "
            f"{config.encoder}: give the weights of that model"
        )
    encoder.trunk.load_state_dict(fitting, strict=False)


def _timm_trunk(config: ModelConfig) -> tuple[nn.Module, list[int]]:
    """The features of timm's `config.encoder` at strides 2, 4, ... below the first level, and their channels.

    Raises:
        ConfigError: timm has no such model, or it has no features at these strides.
    """
    import timm

    assert config.encoder is not None
    strides = [2**level for level in range(1, config.levels + 1)]
    try:
        probe: Any = timm.create_model(config.encoder, pretrained=False, features_only=True)
        reductions = list(probe.feature_info.reduction())
        places = tuple(reductions.index(stride) for stride in strides)
        trunk: Any = timm.create_model(
            config.encoder, pretrained=False, features_only=True, in_chans=config.base, out_indices=places
        )
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"model.encoder={config.encoder} has no features at strides {strides} ({error}): take another "
            "convolutional timm model (for example resnet18), or fewer model.levels"
        ) from error
    return trunk, list(trunk.feature_info.channels())
