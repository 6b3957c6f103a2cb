"""ExperimentConfig: one frozen tree that drives data, model, loss, training and search.

The same dotted keys (`loss.weights.defect`) work in YAML, in `--set` and in a search space.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError, model_validator

from kintsugi.errors import ConfigError
from kintsugi.sections import (
    DataConfig,
    DegradationConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Phase,
    SearchConfig,
    Section,
    TrainConfig,
)


class ExperimentConfig(Section):
    """All that an experiment depends on; it travels in every checkpoint."""

    data: DataConfig = DataConfig()
    degradation: DegradationConfig = DegradationConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        parts, batch = self.train.workers * self.train.micro_batches, self.data.batch_size
        if batch % parts:
            raise ValueError(
                f"data.batch_size must be a multiple of train.workers * train.micro_batches (got {batch} and {parts}): "
                f"set data.batch_size={-(-batch // parts) * parts}"
            )
        least = self.train.min_workers
        if least is not None and least > self.train.workers:
            raise ValueError(
                f"train.min_workers must be at most train.workers (got {least} and {self.train.workers}): lower it"
            )
        if self.data.mask_dropout > 0 and self.model.mask not in ("optional", "predicted"):
            raise ValueError(
                f"data.mask_dropout needs model.mask=optional or predicted (got {self.model.mask}): set one of the two"
            )
        step = self.model.stem * 2**self.model.levels
        if self.data.crop < step:
            raise ValueError(f"data.crop must be at least stem * 2**levels = {step} px (got {self.data.crop})")
        if (self.loss.mask > 0) != (self.model.mask == "predicted"):
            raise ValueError(
                f"loss.mask trains the defect map of model.mask=predicted, and only that (got {self.loss.mask:g} "
                f"and {self.model.mask}): set both or none"
            )
        if (self.loss.error > 0) != self.model.error:
            raise ValueError(
                f"loss.error trains the bound of model.error=true, and only that (got {self.loss.error:g} and "
                f"{self.model.error}): set both or none"
            )
        for phase in self.train.curriculum:
            _at_phase(self, phase)
        return self

    def at_epoch(self, epoch: int) -> "ExperimentConfig":
        """The config that holds in `epoch` (from 0), with the values of the curriculum's phase."""
        for phase in self.train.curriculum:
            if epoch < phase.epochs:
                return _at_phase(self, phase)
            epoch -= phase.epochs
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def parse_config(tree: Mapping[str, Any], source: str = "config") -> ExperimentConfig:
    """Validate a nested mapping.

    Raises:
        ConfigError: naming the dotted key, what is wrong with it and the value it had.
    """
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(_explain(e) for e in error.errors())}") from error


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Read a YAML file and apply `a.b=value` overrides (values are YAML)."""
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): give the path of a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections, for example 'data: {{dataset: demo}}'")
    for override in overrides:
        _set_key(tree, *read_override(override))
    return parse_config(tree, str(path))


def with_values(config: ExperimentConfig, values: Mapping[str, Any]) -> ExperimentConfig:
    """A copy of `config` with dotted keys replaced, validated as a whole."""
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        _set_key(tree, key, value)
    return parse_config(tree, "override")


def _at_phase(config: ExperimentConfig, phase: Phase) -> ExperimentConfig:
    tree = config.model_dump(mode="json")
    tree["train"]["curriculum"] = []
    for key, value in phase.values.items():
        _set_key(tree, key, value)
    return ExperimentConfig.model_validate(tree)


def read_override(override: str) -> tuple[str, Any]:
    """The key and the value (YAML) of `key=value`, as `--set` takes it."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override}: write it as key=value, for example --set train.epochs=3")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: quote it, or close its brackets") from error


def _set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: '{section}' is a value, not a section")
        node = child
    node[leaf] = value


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{key}: no such setting"
    shown = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{key}: {message}{shown}" if key else message
