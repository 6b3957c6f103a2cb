"""What a search found, as it stands in the store: the one thing that tables, reports and the choice of a model read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from optuna.distributions import BaseDistribution

from kintsugi.config import ExperimentConfig

State = Literal["running", "complete", "pruned", "failed"]
METRICS: Mapping[str, str] = {"score": "score", "psnr": "val/psnr", "defect_psnr": "val/defect_psnr"}
"""Objective -> its name among the metrics of an epoch."""


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


@dataclass(frozen=True)
class TrialRecord:
    """One config that was tried.

    Args:
        number: from 0, in the order of the search; a screened trial that went on keeps its number.
        screened: still on the small budget of screening, or stopped there.
        label: name of the known point that it is.
        run: name of its training run below `runs/`.
        values: dotted config key -> value: shares of a simplex as a dict, one entry for each level as a list.
        params: the same as the searcher's coordinates.
        point: objective -> value in dB at its best checkpoint; empty unless it is complete.
        curve: metrics of its epochs, in order.
        reason: why it failed.
    """

    number: int
    state: State
    screened: bool
    label: str | None
    run: str
    values: dict[str, Any]
    params: dict[str, Any]
    point: dict[str, float]
    curve: tuple[dict[str, float], ...]
    started: datetime | None
    ended: datetime | None
    reason: str | None = None

    @property
    def epochs(self) -> int:
        return max((int(metrics["epoch"]) for metrics in self.curve), default=0)

    @property
    def best(self) -> dict[str, float]:
        """Metrics of the epoch with the highest score; empty before the first."""
        return max((epoch for epoch in self.curve if math.isfinite(epoch["score"])), key=_score, default={})

    @property
    def score(self) -> float:
        """The highest, dB; -inf before the first epoch."""
        return self.best.get("score", -math.inf)


@dataclass(frozen=True)
class SearchRecord:
    """A search and its trials, by number.

    Args:
        objectives: all are to be as high as possible.
        origin: objective -> value of the degraded images, untouched; empty before the first epoch of any trial.
        distributions: of the searcher's coordinates.
    """

    name: str
    objectives: tuple[str, ...]
    config: ExperimentConfig
    distributions: dict[str, BaseDistribution]
    trials: tuple[TrialRecord, ...]
    origin: dict[str, float]

    @property
    def complete(self) -> tuple[TrialRecord, ...]:
        """Those that had the full budget."""
        return tuple(trial for trial in self.trials if trial.state == "complete")
