"""A search space: dotted config key -> distribution, in YAML."""

from collections.abc import Mapping
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kintsugi.config import ExperimentConfig, with_values
from kintsugi.errors import ConfigError
from kintsugi_tune.constraints import Constraint

Choices = tuple[bool | int | float | str, ...]
_DRAWS = 200


class Distribution(BaseModel):
    """Exactly one of its fields is set."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    choice: Choices | None = Field(default=None, min_length=2)
    each_level: Choices | None = Field(default=None, min_length=2, description="a choice for each of model.levels")
    simplex: tuple[str, ...] | None = Field(default=None, min_length=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = list(type(self).model_fields)
        if sum(getattr(self, kind) is not None for kind in kinds) != 1:
            raise ValueError(f"needs exactly one of {', '.join(kinds[:-1])} and {kinds[-1]}")
        for bounds in (self.uniform, self.loguniform):
            if bounds is not None and bounds[0] >= bounds[1]:
                raise ValueError(f"the lower bound must be below the upper one (got {bounds[0]} and {bounds[1]})")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"the lower bound of loguniform must be above 0 (got {self.loguniform[0]})")
        for names in (self.choice, self.each_level, self.simplex):
            if names is not None and len(set(names)) < len(names):
                raise ValueError(f"names a value twice (got {', '.join(map(str, names))})")
        return self


class Space(BaseModel):
    """What is searched, what must hold, and the known points that are tried first."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    parameters: dict[str, Distribution] = Field(min_length=1)
    constraints: tuple[str, ...] = ()
    start: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _start_is_searched(self) -> Self:
        for name, point in self.start.items():
            if unknown := point.keys() - self.parameters.keys():
                raise ValueError(f"start.{name} sets {', '.join(sorted(unknown))}, which is not among the parameters")
        return self


class BoundSpace:
    """A space around one config.

    The searcher's coordinates are flat: a simplex of k names becomes k - 1 uniform variables `key:i`, a choice for each
    level one variable `key:level`. Choices of ascending numbers are handed over as their rank, which keeps their order.

    Raises:
        ConfigError: a constraint cannot be read.
    """

    def __init__(self, space: Space, config: ExperimentConfig) -> None:
        self.space, self.config = space, config
        self._constraints = [Constraint(text) for text in space.constraints]

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        flat: dict[str, BaseDistribution] = {}
        for key, part in self.space.parameters.items():
            if part.simplex is not None:
                flat |= {f"{key}:{i}": FloatDistribution(0, 1) for i in range(len(part.simplex) - 1)}
            elif part.each_level is not None:
                flat |= {f"{key}:{i}": _one_of(part.each_level) for i in range(self.config.model.levels)}
            elif part.choice is not None:
                flat[key] = _one_of(part.choice)
            else:
                low, high = part.uniform or part.loguniform or (0.0, 1.0)
                flat[key] = FloatDistribution(low, high, log=part.loguniform is not None)
        return flat

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted config values of a point in the searcher's coordinates."""
        values: dict[str, Any] = {}
        for key, part in self.space.parameters.items():
            if part.simplex is not None:
                shares = break_stick([params[f"{key}:{i}"] for i in range(len(part.simplex) - 1)])
                # What the simplex leaves out has no share.
                named = dict(zip(part.simplex, shares, strict=True))
                values[key] = named | {name: 0.0 for name in self._no_share(key) if name not in named}
            elif part.each_level is not None:
                levels = range(self.config.model.levels)
                values[key] = [_taken(part.each_level, params[f"{key}:{i}"]) for i in levels]
            else:
                values[key] = params[key] if part.choice is None else _taken(part.choice, params[key])
        return values

    def params(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `values`; what `point` leaves out has the config's own value.

        Raises:
            ConfigError: a value that no point of the space has.
        """
        flat: dict[str, Any] = {}
        for key, part in self.space.parameters.items():
            value = point.get(key, self._own(key))
            try:
                flat |= self._coordinates(key, part, value)
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{key}: {value} is not in the space: set another, or widen the space") from error
        for name, distribution in self.distributions.items():
            if not distribution._contains(distribution.to_internal_repr(flat[name])):  # pyright: ignore[reportPrivateUsage]
                raise ConfigError(f"{name.partition(':')[0]}: {flat[name]} is outside of the space: widen it")
        return flat

    def accepted(self, values: Mapping[str, Any]) -> ExperimentConfig:
        """The config with these values.

        Raises:
            ConfigError: they make no valid config, or break a constraint.
        """
        config = with_values(self.config, values)
        tree = config.model_dump(mode="json")
        for constraint in self._constraints:
            if not constraint.holds(tree):
                raise ConfigError(f"the constraint '{constraint.text}' does not hold")
        return config

    def check(self) -> None:
        """Make sure that every known point and every end of a range is a valid config, and that something is left.

        Raises:
            ConfigError: naming the key, the point or the constraints that cannot work.
        """
        for constraint in self._constraints:
            constraint.check(self.config.model_dump(mode="json"))
        for key, part in self.space.parameters.items():
            for value in part.choice or part.each_level or part.uniform or part.loguniform or ():
                with_values(self.config, {key: value})
            if part.simplex is not None:
                shares = dict.fromkeys(part.simplex, 1 / len(part.simplex))
                with_values(self.config, {key: {**self._no_share(key), **shares}})
        for name, point in self.space.start.items():
            try:
                with_values(self.config, point)
                self.accepted(self.values(self.params(point)))
            except ConfigError as error:
                raise ConfigError(f"start.{name}: {error}") from error
        refusals = list(takewhile(bool, map(self._refusal, range(_DRAWS))))
        if len(refusals) == _DRAWS:
            raise ConfigError(
                f"none of {_DRAWS} random points of the space is allowed, the last because {refusals[-1]}: "
                "loosen the constraints, or correct the parameters"
            )

    def random(self, seed: int) -> dict[str, Any]:
        """A random point in the searcher's coordinates."""
        generator = np.random.default_rng(seed)
        return {name: _drawn(distribution, generator) for name, distribution in self.distributions.items()}

    def _refusal(self, seed: int) -> str | None:
        try:
            self.accepted(self.values(self.random(seed)))
        except ConfigError as error:
            return str(error)
        return None

    def _coordinates(self, key: str, part: Distribution, value: Any) -> dict[str, Any]:
        if part.simplex is not None:
            shares = [float(value[name]) for name in part.simplex]
            if abs(sum(shares) - 1) > 1e-6:
                raise ValueError
            return {f"{key}:{i}": u for i, u in enumerate(mend_stick(shares))}
        if part.each_level is not None:
            levels = self.config.model.levels
            entries = value if isinstance(value, list | tuple) else [value] * levels
            pairs = zip(range(levels), entries, strict=True)
            return {f"{key}:{i}": _rank(part.each_level, entry) for i, entry in pairs}
        return {key: float(value) if part.choice is None else _rank(part.choice, value)}

    def _no_share(self, key: str) -> dict[str, float]:
        own = self._own(key)
        return dict.fromkeys(own, 0.0) if isinstance(own, dict) else {}

    def _own(self, key: str) -> Any:
        node: Any = self.config.model_dump(mode="json")
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node


def load_space(path: Path) -> Space:
    """Read a space from YAML.

    Raises:
        ConfigError: naming what cannot work.
    """
    try:
        return Space.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): give the path of a search space in YAML") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {where + ': ' if where else ''}{what}") from error


def _ordered(choices: Choices) -> bool:
    numbers = [choice for choice in choices if isinstance(choice, int | float) and not isinstance(choice, bool)]
    return len(numbers) == len(choices) and numbers == sorted(numbers)


def _one_of(choices: Choices) -> BaseDistribution:
    return IntDistribution(0, len(choices) - 1) if _ordered(choices) else CategoricalDistribution(choices)


def _taken(choices: Choices, coordinate: Any) -> Any:
    return choices[coordinate] if _ordered(choices) else coordinate


def _rank(choices: Choices, value: Any) -> Any:
    place = choices.index(value)
    return place if _ordered(choices) else choices[place]


def _drawn(distribution: BaseDistribution, generator: np.random.Generator) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(generator.integers(len(distribution.choices)))]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if isinstance(distribution, IntDistribution):
        return int(generator.integers(distribution.low, distribution.high, endpoint=True))
    if distribution.log:
        return float(np.exp(generator.uniform(np.log(distribution.low), np.log(distribution.high))))
    return float(generator.uniform(distribution.low, distribution.high))


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
