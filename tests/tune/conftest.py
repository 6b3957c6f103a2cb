"""Searches in this process: trainings whose figures follow from their values and the epoch alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
import pytest

from kintsugi.config import parse_config
from kintsugi_tune.ledger import Ledger, Plan, Proposal, Stage
from kintsugi_tune.record import SearchRecord
from kintsugi_tune.space import Space

PARAMETERS = {
    "model.dropout": {"uniform": [0.0, 0.3]},
    "model.base": {"choice": [8, 16, 64]},
    "model.skips": {"each_level": ["off", "concat", "add"]},
}
START = {"recipe": {}, "small": {"model.base": 8, "model.dropout": 0.0, "model.skips": "concat"}}


def figures(values: Mapping[str, Any], epoch: int) -> dict[str, float]:
    """The metrics of an epoch: a little worse after the third, and each objective has a best dropout of its own."""
    learnt = 1 - math.exp(-epoch) - 0.05 * max(0, epoch - 3)
    dropout, skips = values["model.dropout"], sum(skip != "off" for skip in values["model.skips"])
    gain = (4 - 30 * (dropout - 0.05) ** 2 + 0.1 * skips) * learnt
    defect_gain = (3 - 40 * (dropout - 0.2) ** 2 + values["model.base"] / 64) * learnt
    return {
        "epoch": epoch, "score": min(gain, defect_gain),
        "val/psnr": 24 + gain, "val/psnr_gain": gain,
        "val/defect_psnr": 20 + defect_gain, "val/defect_psnr_gain": defect_gain,
    }  # fmt: skip


@dataclass
class Trainings:
    """What runs the trials; its runs keep their epochs when the search is killed.

    Args:
        fault: says for values and an epoch why the training fails there, if it does.
    """

    fault: Callable[[Mapping[str, Any], int], str | None] = lambda values, epoch: None
    epochs: dict[str, int] = field(default_factory=dict)
    told: set[tuple[str, int]] = field(default_factory=set)

    def search(self, ledger: Ledger) -> SearchRecord:
        """Go on with a search, one trial at a time, until it is done."""
        self.told.clear()
        for stage in ledger.stages():
            while (proposal := stage.next()) is not None:
                while not self.step(stage, proposal):
                    pass
        return ledger.record()

    def step(self, stage: Stage, proposal: Proposal) -> bool:
        """Train and tell one epoch, or the end of the trial; whether it was the end.

        The first step after a kill tells the newest epoch again, as no one knows whether it was told.
        """
        number, values, known = proposal.number, proposal.values, self.epochs.get(proposal.run, 0)
        again = known > 0 and (stage.name, number) not in self.told
        epoch = known if again else known + 1
        if epoch > proposal.epochs:
            stage.complete(number, max((figures(values, e) for e in range(1, known + 1)), key=lambda m: m["score"]))
            return True
        if not again and (reason := self.fault(values, epoch)) is not None:
            stage.fail(number, reason)
            return True
        self.epochs[proposal.run] = epoch
        stop = stage.observe(number, figures(values, epoch))
        self.told.add((stage.name, number))
        if stop:
            stage.stopped(number)
        return stop


def plan_of(
    *,
    parameters: Mapping[str, Any] = PARAMETERS,
    start: Mapping[str, Any] = START,
    constraints: tuple[str, ...] = (),
    sections: Mapping[str, Any] | None = None,
    **search: Any,
) -> Plan:
    """A search `s` of 6 trials, 4 of them screened for 3 epochs, the rest for 5; `search` are other settings of it."""
    settings = {
        "trials": 6, "screened": 4, "epochs": 5, "screen_epochs": 3, "reduction_factor": 2, "sampler": "random",
    }  # fmt: skip
    config = parse_config({**(sections or {}), "search": {**settings, **search}})
    space = {"parameters": parameters, "start": start, "constraints": constraints}
    return Plan("s", config, Space.model_validate(space))


def timeless(record: SearchRecord) -> SearchRecord:
    """A record without the times of day."""
    return replace(record, trials=tuple(replace(trial, started=None, ended=None) for trial in record.trials))


@pytest.fixture(name="plan_of")
def _plan_of() -> Callable[..., Plan]:
    return plan_of


@pytest.fixture(name="timeless")
def _timeless() -> Callable[[SearchRecord], SearchRecord]:
    return timeless


@pytest.fixture(name="trainings")
def _trainings() -> type[Trainings]:
    return Trainings


@pytest.fixture(name="figures")
def _figures() -> Callable[[Mapping[str, Any], int], dict[str, float]]:
    return figures


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
