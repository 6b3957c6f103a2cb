"""A search among Ray's metrics, hence Prometheus's: `kintsugi_tune_...`, tagged `search`."""

from collections import Counter
from typing import get_args

from ray.util.metrics import Gauge

from kintsugi_tune.record import METRICS, SearchRecord, State


class SearchGauges:
    """Trials by state, all of them from the start, and the best of each objective in dB; while the search runs."""

    def __init__(self) -> None:
        about = "Trials of a search by state"
        self._trials = Gauge("kintsugi_tune_trials", about, tag_keys=("search", "state"))
        self._best = Gauge("kintsugi_tune_best_db", "Best of an objective so far", tag_keys=("search", "objective"))

    def __call__(self, record: SearchRecord) -> None:
        found = Counter(trial.state for trial in record.trials)
        for state in get_args(State):
            self._trials.set(found[state], {"search": record.name, "state": state})
        for objective in record.objectives:
            values = [trial.best[METRICS[objective]] for trial in record.trials if METRICS[objective] in trial.best]
            if values:
                self._best.set(max(values), {"search": record.name, "objective": objective})
