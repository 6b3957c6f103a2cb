"""Ray Tune over experiment configs: each trial a Ray Train run, ASHA stopping the weak ones."""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from kintsugi.config import ExperimentConfig, parse_config, with_values
from kintsugi.errors import TrainingError
from kintsugi.training.filesystem import run_storage
from kintsugi.training.launch import launch_training
from kintsugi_tune.space import Space

METRIC = "score"


@dataclass(frozen=True)
class Trial:
    """One point of a search. `score` in dB is its best, missing where the trial failed before its first epoch."""

    run: str
    values: dict[str, Any]
    score: float | None
    epochs: int
    error: str | None


@dataclass(frozen=True)
class SearchResult:
    """All trials, the best first."""

    search: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        return self.trials[0]


def launch_search(config: ExperimentConfig, space: Space, store_uri: str, search: str) -> SearchResult:
    """Search on the connected Ray cluster; trials and their checkpoints go to `runs/<search>/trials/`.

    Raises:
        ConfigError: a known point or the end of a range is no valid config; nothing has started then.
        TrainingError: every trial failed.
    """
    space.check(config)
    # Curves and HParams are written by the training itself; Tune's own TensorBoard logger would repeat them.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    logging.getLogger("optuna").setLevel(logging.WARNING)
    limits = config.search
    payload = {"config": config.model_dump(mode="json"), "store": store_uri, "search": search}
    tuner = tune.Tuner(
        # A trial itself holds no CPU: on a small machine its training workers could not start otherwise.
        tune.with_resources(tune.with_parameters(_run_trial, payload=payload, space=space), {"memory": 1}),
        tune_config=tune.TuneConfig(
            num_samples=limits.trials,
            max_concurrent_trials=limits.max_concurrent,
            search_alg=OptunaSearch(
                space=space.distributions(),
                metric=METRIC,
                mode="max",
                points_to_evaluate=[space.encode(point) for point in space.start][: limits.trials],
                seed=config.train.seed,
            ),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                metric=METRIC,
                mode="max",
                max_t=limits.epochs,
                grace_period=min(limits.grace_epochs, limits.epochs),
                reduction_factor=limits.reduction_factor,
            ),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=search,
            **run_storage(f"{store_uri}/runs"),
            callbacks=[JsonLoggerCallback(), _Progress(limits.trials)],
            verbose=0,
        ),
    )
    return _collect(tuner.fit(), space, search)


class _Progress(tune.Callback):
    """One line for each trial that ends."""

    def __init__(self, trials: int) -> None:
        self._trials, self._ended = trials, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result
        self._tell(
            trial, f"ended after epoch {last.get('epoch', 0)} with score {last.get(METRIC, float('nan')):+.2f} dB"
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, "failed: its error is in the Ray dashboard and in the table at the end")

    def _tell(self, trial: Any, what: str) -> None:
        self._ended += 1
        sys.stderr.write(f"trial {self._ended}/{self._trials} ({trial.trial_id}) {what}\n")


def _run_trial(flat: dict[str, Any], payload: dict[str, Any], space: Space) -> None:
    values = space.decode(flat)
    base = parse_config(payload["config"])
    budget = {"train.epochs": base.search.epochs, "train.workers": base.search.workers_per_trial}
    config = with_values(base, {**budget, **values})
    run = trial_run(payload["search"], tune.get_context().get_trial_id())
    launch_training(config, payload["store"], run, callbacks=[TuneReportCallback()], settings=_flatten(values))


def trial_run(search: str, trial_id: str) -> str:
    return f"{search}/trials/{trial_id}"


def _collect(results: Any, space: Space, search: str) -> SearchResult:
    trials = [_trial(result, space, search) for result in results]
    finished = sorted((t for t in trials if t.score is not None), key=lambda t: -(t.score or 0.0))
    if not finished:
        raise TrainingError(f"every trial of {search} failed, the first with: {trials[0].error}")
    return SearchResult(search, (*finished, *(t for t in trials if t.score is None)))


def _trial(result: Any, space: Space, search: str) -> Trial:
    frame = result.metrics_dataframe
    scores = [] if frame is None or METRIC not in frame else frame[METRIC].dropna().tolist()
    trial_id = str((result.metrics or {}).get("trial_id") or result.path.rstrip("/").rpartition("/")[2])
    return Trial(
        run=trial_run(search, trial_id),
        values=space.decode(result.config) if result.config else {},
        score=max(scores, default=None),
        epochs=len(scores),
        error=None if result.error is None else str(result.error).strip().splitlines()[-1],
    )


def _flatten(values: Mapping[str, Any]) -> dict[str, float | str]:
    """Dotted scalars for the HParams table."""
    flat: dict[str, float | str] = {}
    for key, value in values.items():
        flat |= {f"{key}.{name}": share for name, share in value.items()} if isinstance(value, dict) else {key: value}
    return flat
