"""Ray Tune runs what the ledger proposes: each trial a Ray Train run, screened ones stopped by successive halving."""

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.train._internal.session import get_session
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from kintsugi.checkpoint import best_metrics, newest_metrics
from kintsugi.errors import KintsugiError, RunInterrupted
from kintsugi.storage import LONG, open_store
from kintsugi.training.filesystem import run_storage
from kintsugi.training.launch import launch_training
from kintsugi_tune.gauges import SearchGauges
from kintsugi_tune.ledger import Ledger, Stage, load_plan, trial_config
from kintsugi_tune.live import Live

_KEPT = ("epoch", "score", "learning_rate", "loss/", "val/", "train/")


def run_search(ledger: Ledger, store_uri: str, *, max_concurrent: int, budget_minutes: float | None) -> bool:
    """Run a search on the connected Ray cluster until it is done, time is up or someone interrupts it.

    The trials that are then under way stay so in the ledger, and the same search continues them.

    Returns:
        Whether it is done.
    """
    # The trainings write their own curves and HParams; Tune's loggers would repeat them.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which prints whatever `verbose` says
    logging.getLogger("optuna").setLevel(logging.WARNING)
    deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    with Live(ledger, deadline, also=SearchGauges()) as live:
        for stage in ledger.stages():
            seconds = None if deadline is None else deadline - time.monotonic()
            if stage.left and (seconds is None or seconds > 0):
                _tuner(ledger, stage, store_uri, live, max_concurrent, seconds).fit()
            if stage.left:
                return False
    return True


def _tuner(
    ledger: Ledger, stage: Stage, store_uri: str, live: Live, max_concurrent: int, seconds: float | None
) -> tune.Tuner:
    payload = {"store": store_uri, "search": ledger.plan.name}
    return tune.Tuner(
        # A trial itself holds no CPU: on a small machine its training workers could not start otherwise.
        tune.with_resources(tune.with_parameters(_run_trial, payload=payload), {"memory": 1}),
        tune_config=tune.TuneConfig(
            num_samples=stage.left,
            max_concurrent_trials=max_concurrent,
            search_alg=_Asker(stage),
            scheduler=_Halving(stage),
            time_budget_s=seconds,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"tune-{stage.name}",
            **run_storage(f"{store_uri}/{ledger.plan.root}"),
            failure_config=tune.FailureConfig(max_failures=ledger.plan.config.train.max_failures),
            callbacks=[_Watch(stage, live)],
            verbose=0,
        ),
    )


class _Unkept:
    """Tune keeps copies of what it works with, to go on from; the ledger in the store is what a search goes on from."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class _Asker(_Unkept, Searcher):
    """Hands Tune the ledger's proposals."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(metric=None, mode=None)
        self._stage = stage

    def suggest(self, trial_id: str) -> Any:
        proposal = self._stage.next()
        if proposal is None:
            return Searcher.FINISHED
        return {
            "number": proposal.number, "run": proposal.run, "values": proposal.values,
            "epochs": proposal.epochs, "label": proposal.label,
        }  # fmt: skip

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler has told the ledger already, and a callback why a process died."""

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Halving(_Unkept, FIFOScheduler):
    """Tells the ledger each epoch and each end, and stops the trials that the ledger gives up."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number = trial.config["number"]
        if "failed" in result:
            self._stage.fail(number, result["failed"])
        elif "finished" in result:
            self._stage.complete(number, _figures(result))
        elif "score" not in result or not self._stage.observe(number, _figures(result)):
            return TrialScheduler.CONTINUE
        else:
            self._stage.stopped(number)
        return TrialScheduler.STOP


class _Watch(_Unkept, tune.Callback):
    """Tells the person who watches, and the ledger why a trial's process died for good."""

    def __init__(self, stage: Stage, live: Live) -> None:
        self._stage, self._live = stage, live

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._live.show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, error = trial.config["number"], trial.get_error()
        if self._stage.is_running(number):
            self._stage.fail(number, str(error).strip().splitlines()[-1] if error else "its process died")


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in result.items() if key.startswith(_KEPT) and isinstance(value, int | float)}


def _run_trial(proposal: dict[str, Any], payload: dict[str, Any]) -> None:
    """In an actor of Tune's: train, or go on training, and tell the metrics of the best checkpoint."""
    store = open_store(payload["store"], LONG)
    plan, run = load_plan(store, payload["search"]), proposal["run"]
    config = trial_config(plan, proposal["values"], proposal["epochs"])
    # Workers wait for those of other trials to be done, or for nodes to come, as long as it takes.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(24 * 3600)
    # After a restart the last epoch may have been trained and never been told.
    if known := newest_metrics(store, run):
        _tell(known)
    try:
        launch_training(
            config, payload["store"], run,
            callbacks=[TuneReportCallback()], settings=flat_settings(proposal["values"]), init=plan.init,
        )  # fmt: skip
        _tell({**best_metrics(store, run), "finished": True})
    except RunInterrupted:
        raise  # Tune begins the trial again, and it goes on
    except KintsugiError as error:
        _tell({"failed": str(error)})
    # The scheduler ends the trial when it reads that. Tune would take a return for the end, whatever is not read yet.
    threading.Event().wait()


def _tell(metrics: Mapping[str, Any]) -> None:
    """Through the queue that Ray Train's reports take: `tune.report` would wait for ever behind one of them."""
    session = get_session()
    assert session is not None
    session._get_or_create_inter_actor_queue().put(dict(metrics))  # pyright: ignore[reportPrivateUsage]


def flat_settings(values: Mapping[str, Any]) -> dict[str, float | str]:
    """Dotted scalars for the HParams table."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        flat |= {f"{key}.{name}": part for name, part in parts} or {key: value}
    return flat
