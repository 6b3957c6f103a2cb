"""A search space: dotted config key -> distribution, in YAML."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kintsugi.config import ExperimentConfig, with_values
from kintsugi.errors import ConfigError


class Distribution(BaseModel):
    """Exactly one of its fields is set."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    choice: tuple[bool | int | float | str, ...] | None = None
    simplex: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(value is not None for value in (self.uniform, self.loguniform, self.choice, self.simplex)) != 1:
            raise ValueError("needs exactly one of uniform, loguniform, choice and simplex")
        for bounds in (self.uniform, self.loguniform):
            if bounds is not None and bounds[0] >= bounds[1]:
                raise ValueError(f"the lower bound must be below the upper one (got {bounds[0]} and {bounds[1]})")
        if self.simplex is not None and len(self.simplex) < 2:
            raise ValueError("a simplex needs at least two names")
        return self


class Space(BaseModel):
    """What is searched, and the known points that are tried first."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    parameters: dict[str, Distribution]
    start: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _start_is_whole(self) -> Self:
        for point in self.start:
            if point.keys() != self.parameters.keys():
                raise ValueError(f"a start point must set {', '.join(self.parameters)} (got {', '.join(point)})")
        return self

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions; a simplex of k names becomes k - 1 uniform variables `key:i`."""
        flat: dict[str, BaseDistribution] = {}
        for key, part in self.parameters.items():
            if part.simplex is not None:
                flat |= {f"{key}:{i}": FloatDistribution(0, 1) for i in range(len(part.simplex) - 1)}
            elif part.choice is not None:
                flat[key] = CategoricalDistribution(part.choice)
            else:
                low, high = part.uniform or part.loguniform or (0.0, 1.0)
                flat[key] = FloatDistribution(low, high, log=part.loguniform is not None)
        return flat

    def decode(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted config values of one sampled point."""
        values: dict[str, Any] = {}
        for key, part in self.parameters.items():
            if part.simplex is None:
                values[key] = flat[key]
            else:
                shares = break_stick([flat[f"{key}:{i}"] for i in range(len(part.simplex) - 1)])
                values[key] = dict(zip(part.simplex, shares, strict=True))
        return values

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `decode`."""
        flat: dict[str, Any] = {}
        for key, part in self.parameters.items():
            if part.simplex is None:
                flat[key] = values[key]
            else:
                shares = [float(values[key][name]) for name in part.simplex]
                flat |= {f"{key}:{i}": u for i, u in enumerate(mend_stick(shares))}
        return flat

    def check(self, config: ExperimentConfig) -> None:
        """Make sure that every known point and every end of a range is a valid config.

        Raises:
            ConfigError: naming the key that cannot work.
        """
        for point in self.start:
            with_values(config, point)
        for key, part in self.parameters.items():
            for value in part.choice or part.uniform or part.loguniform or ():
                with_values(config, {key: value})
            if part.simplex is not None:
                with_values(config, {key: dict.fromkeys(part.simplex, 1 / len(part.simplex))})


def load_space(path: Path) -> Space:
    try:
        return Space.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): give the path of a search space in YAML") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from error


def break_stick(uniforms: list[float]) -> list[float]:
    """k - 1 uniform variables to k shares that sum to 1, uniform over the simplex.

    Stick-breaking of a flat Dirichlet distribution: share i is Beta(1, k - i) of what is left.
    """
    rest, shares = 1.0, []
    for i, u in enumerate(uniforms):
        share = rest * (1 - u ** (1 / (len(uniforms) - i)))
        shares.append(share)
        rest -= share
    return [*shares, rest]


def mend_stick(shares: list[float]) -> list[float]:
    """The inverse of `break_stick`."""
    rest, uniforms = 1.0, []
    for i, share in enumerate(shares[:-1]):
        left = max(0.0, 1 - share / rest) if rest > 0 else 1.0
        uniforms.append(left ** (len(shares) - 1 - i))
        rest -= share
    return uniforms
