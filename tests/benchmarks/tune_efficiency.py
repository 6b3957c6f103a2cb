"""Searches without Ray: the same ledger, trials trained one after another in this process.

Every method gets the same number of epochs to spend, on the same images, with the same seeds.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch

from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.data.dataset import SplitReader, open_split
from kintsugi.losses import build_loss
from kintsugi.models import PerceptualDistance
from kintsugi.storage import MemoryStore, open_store
from kintsugi.training.loop import fit
from kintsugi.training.state import TrainState, build_state
from kintsugi_tune.front import hypervolume, pareto_front
from kintsugi_tune.ledger import Ledger, Plan, Proposal, Stage, trial_config
from kintsugi_tune.record import SearchRecord
from kintsugi_tune.space import load_space

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "tune" / "spaces" / "restoration.yaml"
SMALL: Mapping[str, Any] = {
    "data.crop": 48, "data.batch_size": 8, "data.small_images": "mirror", "data.mask_dropout": 0.0, "data.planted": 0.0,
    "model.base": 12, "model.mask": "none", "model.error": False, "loss.mask": 0.0, "loss.error": 0.0,
    "loss.invention": 0.0, "optim.ema": 0.0,
    "loss.perceptual": {"network": "vgg11", "layers": [1], "weights": "random"},
    "train.steps_per_epoch": 40, "train.validation_images": 10, "train.curriculum": [], "train.workers": 1,
    "optim.restart_epochs": 6, "search.epochs": 6, "search.workers_per_trial": 1,
}  # fmt: skip
"""light.yaml with a tenth of its weights, for a few hundred steps: what a search on two cores can afford."""
NO_START = load_space(SPACE).model_copy(update={"start": {}})
METHODS: Mapping[str, Mapping[str, Any]] = {
    "random": {"search.screened": 0, "search.sampler": "random"},
    "ours": {"search.screened": 9, "search.screen_epochs": 2, "search.sampler": "auto"},
}


def base_config(store_uri: str, dataset: str, **changed: Any) -> ExperimentConfig:
    config = load_config(ROOT / "platform" / "configs" / "light.yaml")
    return with_values(config, {**SMALL, "data.dataset": dataset, **changed})


@dataclass(frozen=True)
class Spent:
    """What was found when so many epochs had been spent; `unknown`: the best score but for known points."""

    epochs: int
    hypervolume: float
    score: float
    unknown: float


@dataclass
class Outcome:
    method: str
    seed: int
    record: SearchRecord
    progress: list[Spent] = field(default_factory=list)

    @property
    def recipe(self) -> float:
        """The score of the first known point."""
        return next(trial.best["score"] for trial in self.record.trials if trial.label is not None)

    @property
    def best(self) -> float:
        return self.progress[-1].score

    def until(self, score: float) -> int | None:
        """Epochs spent when a trial other than the known points had `score`."""
        for spent in self.progress:
            if spent.unknown >= score:
                return spent.epochs
        return None


@dataclass(frozen=True)
class Halved:
    """What successive halving makes of trials whose whole curves are known."""

    trials: int
    epochs: int
    full_epochs: int
    winner: float
    best_of_all: float


def halved(record: SearchRecord) -> Halved:
    """Replay complete trials, in their order, through screening at their full budget."""
    complete = record.complete
    search = record.config.search
    again = {"search.screened": len(complete), "search.trials": len(complete), "search.screen_epochs": search.epochs}
    stage = next(Ledger(MemoryStore(), Plan("again", with_values(record.config, again), NO_START), owner=True).stages())
    for trial in complete:
        proposal = stage.next()
        assert proposal is not None
        for metrics in trial.curve:
            if stage.observe(proposal.number, metrics):
                stage.stopped(proposal.number)
                break
        else:
            stage.complete(proposal.number, trial.best)
    study = stage.study.get_trials(deepcopy=False)
    kept = [known.best["score"] for known, t in zip(complete, study, strict=True) if t.state.name == "COMPLETE"]
    spent = sum(max(t.intermediate_values) for t in study)
    full = sum(trial.epochs for trial in complete)
    return Halved(len(complete), spent, full, max(kept), max(trial.best["score"] for trial in complete))


def search(method: str, seed: int, store_uri: str, dataset: str, epochs: int) -> Outcome:
    """Search until `epochs` are spent."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    limits = {"search.trials": 1000, "train.seed": seed, **METHODS[method]}
    config = base_config(store_uri, dataset, **limits)
    plan = Plan(f"{method}-{seed}", config, load_space(SPACE))
    store = open_store(store_uri)
    trainer = _Trainer(plan, open_split(store, dataset, "train"), open_split(store, dataset, "val"))
    ledger = Ledger(MemoryStore(), plan, owner=True)
    outcome = Outcome(method, seed, ledger.record())
    for stage in ledger.stages():
        while stage.left and trainer.epochs < epochs and (proposal := stage.next()):
            _one(stage, proposal, trainer)
            outcome.record = ledger.record()
            outcome.progress.append(_spent(outcome.record, trainer.epochs))
    return outcome


def _one(stage: Stage, proposal: Proposal, trainer: "_Trainer") -> None:
    best: dict[str, float] = trainer.best(proposal)
    for metrics in trainer.train(proposal):
        best = metrics if metrics["score"] > best.get("score", float("-inf")) else best
        if stage.observe(proposal.number, metrics):
            stage.stopped(proposal.number)
            return
    stage.complete(proposal.number, best)


def _spent(record: SearchRecord, epochs: int) -> Spent:
    points = [[trial.point[name] for name in record.objectives] for trial in pareto_front(record.trials)]
    area = hypervolume(points, [record.origin[name] for name in record.objectives]) if points else 0.0
    scores = {trial.number: trial.best["score"] for trial in record.trials if trial.curve}
    unknown = [scores[trial.number] for trial in record.trials if trial.curve and trial.label is None]
    return Spent(epochs, area, max(scores.values()), max(unknown, default=-math.inf))


class _Trainer:
    """Trains trials epoch by epoch, and goes on with those that were screened."""

    def __init__(self, plan: Plan, train: SplitReader, val: SplitReader) -> None:
        self.plan, self._train, self._val = plan, train, val
        self._states: dict[str, tuple[TrainState, dict[str, float]]] = {}
        self.epochs = 0

    def best(self, proposal: Proposal) -> dict[str, float]:
        return dict(self._states[proposal.run][1]) if proposal.run in self._states else {}

    def train(self, proposal: Proposal) -> Iterator[dict[str, float]]:
        config = trial_config(self.plan, proposal.values, proposal.epochs)
        state, best = self._states.setdefault(proposal.run, (build_state(config, self._train.digest), {}))
        perceptual = PerceptualDistance(config.loss.perceptual) if config.loss.weights.perceptual > 0 else None
        loss = build_loss(config.loss, perceptual)
        while state.epoch < config.train.epochs:
            found: list[dict[str, float]] = []
            one = with_values(config, {"train.epochs": state.epoch + 1})
            fit(state, one, self._train, self._val, loss, lambda metrics, _, to=found: to.append(dict(metrics)))
            self.epochs += 1
            if found[0]["score"] > best.get("score", float("-inf")):
                best.clear()
                best.update(found[0])
            yield found[0]
