"""What a search varied, told in words and laid out along axes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from kintsugi_tune.record import SearchRecord, TrialRecord

Value = bool | int | float | str
UNITS: Mapping[str, str] = {"score": "score, dB", "psnr": "PSNR, dB", "defect_psnr": "defect PSNR, dB"}
"""Objective -> how it is written."""


@dataclass(frozen=True)
class Axis:
    """One number or choice that trials differ in.

    Args:
        group, part: the config key's last word, and the entry's name within it; `part` may be empty.
        values: trial number -> value; a trial may lack it.
        choices: in their order; empty for a range.
    """

    group: str
    part: str
    values: dict[int, Value]
    choices: tuple[Value, ...] = ()
    log: bool = False

    @property
    def label(self) -> str:
        return f"{self.group}: {self.part}" if self.part else self.group

    @property
    def numeric(self) -> bool:
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values.values())

    def places(self) -> dict[int, float]:
        """Trial number -> place in [0, 1]; choices are evenly apart, a range is as far as its trials reach."""
        if self.choices:
            steps = max(1, len(self.choices) - 1)
            return {number: self.choices.index(value) / steps for number, value in self.values.items()}
        scaled = {number: np.log(float(v)) if self.log else float(v) for number, v in self.values.items()}
        low, high = min(scaled.values(), default=0.0), max(scaled.values(), default=1.0)
        return {number: float((v - low) / (high - low)) if high > low else 0.5 for number, v in scaled.items()}


def axes(record: SearchRecord, trials: Iterable[TrialRecord]) -> list[Axis]:
    """An axis for each real value of `trials`: each share of a simplex, each level, each single value."""
    found: dict[tuple[str, str], dict[int, Value]] = {}
    for trial in trials:
        for key, value in trial.values.items():
            for part, entry in _parts(value):
                found.setdefault((key, part), {})[trial.number] = entry
    return [_axis(record, key, part, values) for (key, part), values in found.items()]


def coordinate_label(key: str, record: SearchRecord) -> str:
    """What the searcher's coordinate `key` stands for.

    Coordinate i of a simplex is the share of its i-th name in what the names before it leave, written `name | before`;
    coordinate i of a list is its level i.
    """
    name, _, place = key.partition(":")
    value = next((trial.values[name] for trial in record.trials if name in trial.values), None)
    if not place:
        return _leaf(name)
    if not isinstance(value, dict):
        return f"{_leaf(name)}: level {place}"
    *before, named = list(value)[: int(place) + 1]
    return f"{_leaf(name)}: {named} | {', '.join(before)}" if before else f"{_leaf(name)}: {named}"


def values_told(trial: TrialRecord) -> list[str]:
    """One line for each key."""
    return [
        f"{_leaf(key)}: {', '.join(f'{name} {_short(entry)}'.strip() for name, entry in _named(value))}"
        for key, value in trial.values.items()
    ]


def trial_told(trial: TrialRecord) -> str:
    """A trial's number, with its label where it is a known point."""
    return f"{trial.number} ({trial.label})" if trial.label else str(trial.number)


def _axis(record: SearchRecord, key: str, part: str, values: dict[int, Value]) -> Axis:
    known = record.distributions.get(key) or record.distributions.get(f"{key}:{part.removeprefix('level ')}")
    log = isinstance(known, FloatDistribution | IntDistribution) and known.log and min(map(float, values.values())) > 0
    ordered: list[Value] = []
    if isinstance(known, CategoricalDistribution):
        ordered = [choice for choice in known.choices if choice is not None]
    if ordered or any(isinstance(value, bool | str) for value in values.values()):
        ordered = list(dict.fromkeys((*ordered, *values.values())))
        if not any(isinstance(choice, bool | str) for choice in ordered):
            ordered.sort(key=float)
    return Axis(_leaf(key), part, values, tuple(ordered), log)


def _parts(value: Any) -> list[tuple[str, Value]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return [(f"level {place}", entry) for place, entry in enumerate(value)]
    return [("", value)]


def _named(value: Any) -> list[tuple[str, Value]]:
    """As `_parts`, without shares of 0, and without the numbers of levels, which follow from the order."""
    if isinstance(value, dict):
        return [(name, entry) for name, entry in value.items() if entry != 0]
    return [("", entry) for _, entry in _parts(value)]


def _short(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")
