"""Which hyper-parameters a search's results depend on."""

import logging
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial
from scipy.stats import rankdata

from kintsugi_tune.record import SearchRecord, TrialRecord
from kintsugi_tune.values import axes, coordinate_label

ENOUGH = 4
"""Complete trials without which nothing can be said."""
TOP = 0.25
"""Share of the trials that count as good."""


def importances(record: SearchRecord, objective: str) -> dict[str, float]:
    """Share of each of the searcher's coordinates in what sets the best quarter of the complete trials apart.

    PED-ANOVA (Watanabe et al., IJCAI 2023). The shares sum to 1, the largest first; empty for fewer than `ENOUGH`
    trials, and where nothing varies. Known points outside the searched ranges are left out.
    """
    logging.getLogger("optuna").setLevel(logging.WARNING)
    found = [frozen for trial in record.complete if (frozen := _frozen(record, trial, objective)) is not None]
    if len(found) < ENOUGH or len({frozen.value for frozen in found}) == 1:
        return {}
    study = optuna.create_study(direction="maximize")
    study.add_trials(found)
    shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP))
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return {coordinate_label(key, record): float(share) for key, share in ordered}


def correlations(record: SearchRecord, objective: str) -> dict[str, float]:
    """Spearman's rank correlation of each value that is a number with an objective, over the complete trials.

    Values that do not vary are left out.
    """
    points = {trial.number: trial.point[objective] for trial in record.complete}
    found: dict[str, float] = {}
    for axis in axes(record, record.complete):
        numbers = [number for number in axis.values if number in points]
        if axis.numeric and len(numbers) >= ENOUGH:
            rho = _spearman([float(axis.values[n]) for n in numbers], [points[n] for n in numbers])
            found |= {} if rho is None else {axis.label: rho}
    return found


def by_chance(count: int) -> float:
    """The correlation that 19 of 20 unrelated samples of `count` values stay below, approximately."""
    return min(1.0, 1.96 / float(np.sqrt(count - 1)))


def _spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    if min(len(set(one)), len(set(other))) < 2:
        return None
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def _frozen(record: SearchRecord, trial: TrialRecord, objective: str) -> FrozenTrial | None:
    known = {key: record.distributions[key] for key in trial.params if key in record.distributions}
    try:
        return optuna.trial.create_trial(
            value=trial.point[objective], params={key: trial.params[key] for key in known}, distributions=known
        )
    except ValueError:
        return None
