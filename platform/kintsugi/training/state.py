"""TrainState: all that changes while a model trains, and its way to a checkpoint and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.optim.swa_utils import AveragedModel

from kintsugi.checkpoint import Checkpoint, load_checkpoint, load_train_state, load_weights, save_checkpoint
from kintsugi.config import ExperimentConfig
from kintsugi.errors import TrainingError
from kintsugi.models import RestorationUNet, build_model
from kintsugi.models.encoder import load_encoder_weights

_COUNTERS = ("epoch", "step", "best", "stale")


@dataclass
class TrainState:
    """`epoch` is the number of finished epochs; `stale` counts those since the best score.

    `step` counts the steps done in the epoch under way, and `sums` what its loss terms add up to so far, a row
    for each worker, (world, terms). No generator is kept: order, crops, degradations and dropout are functions of
    (seed, epoch, step, sample).
    """

    model: RestorationUNet
    optimizer: Optimizer
    scheduler: CosineAnnealingWarmRestarts
    dataset_digest: str
    epoch: int = 0
    step: int = 0
    sums: Tensor | None = None
    best: float = float("-inf")
    stale: int = 0
    averaged: AveragedModel | None = None

    @property
    def published(self) -> RestorationUNet:
        """The model that is judged and kept: the averaged one, if there is one."""
        return self.model if self.averaged is None else cast(RestorationUNet, self.averaged.module)

    def note(self, score: float) -> None:
        """Count an epoch that ended with `score`."""
        self.epoch, self.step, self.sums = self.epoch + 1, 0, None
        self.scheduler.step()
        self.stale = 0 if score > self.best else self.stale + 1
        self.best = max(self.best, score)

    def save(
        self, folder: Path, config: ExperimentConfig, metrics: Mapping[str, float], card: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint that both resumes and restores."""
        progress = {name: getattr(self, name) for name in (*_COUNTERS, "sums", "dataset_digest")}
        live = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        if self.averaged is not None:
            live |= {"model": self.model.state_dict(), "averages": self.averaged.n_averaged}
        save_checkpoint(folder, self.published, config, metrics, card, {**progress, **live})

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of the same data and model.

        Raises:
            TrainingError: the checkpoint was trained on another dataset, or is of another model.
            IntegrityError: its files are damaged.
        """
        checkpoint = load_checkpoint(folder)
        saved = load_train_state(checkpoint)
        if saved["dataset_digest"] != self.dataset_digest:
            raise TrainingError(
                f"the run was trained on dataset {saved['dataset_digest'][:12]} and now finds "
                f"{self.dataset_digest[:12]}: name the old one as data.dataset, or start a run under a new name"
            )
        if differ := self.model.config.other_weights(checkpoint.config.model):
            told = ", ".join(f"{key} was {value}" for key, value in differ.items())
            raise TrainingError(
                f"the run was begun with another model ({told}): set that, or start a run under a new name"
            )
        load_weights(self.published, checkpoint)
        if (saved.get("model") is None) != (self.averaged is None):
            raise TrainingError(
                "the run was begun with optim.ema on and now has it off, or the other way: set it as it was"
            )
        if self.averaged is not None:
            self.model.load_state_dict(saved["model"])
            self.averaged.n_averaged.copy_(saved["averages"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        for name in (*_COUNTERS, "sums"):
            setattr(self, name, saved[name])

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Take the weights of another run's checkpoint, and nothing else of it.

        Raises:
            IntegrityError: they are of another model.
        """
        load_weights(self.model, checkpoint)
        if self.averaged is not None:
            load_weights(self.published, checkpoint)


def build_state(config: ExperimentConfig, dataset_digest: str, device: torch.device | str = "cpu") -> TrainState:
    """A fresh state; the weights are a function of `train.seed`."""
    torch.manual_seed(config.train.seed)
    model = build_model(config.model)
    load_encoder_weights(model.encoder, config.model)
    # Convolutions run faster with channels last: by a quarter on a CPU, more on tensor cores.
    model = model.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optim = config.optim
    optimizer = AdamW(model.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay, fused=True)
    scheduler = CosineAnnealingWarmRestarts(
        optimizer, optim.restart_epochs, optim.restart_factor, eta_min=optim.min_learning_rate
    )
    averaged = AveragedModel(model, multi_avg_fn=_warm_average(optim.ema)) if optim.ema > 0 else None
    return TrainState(model, optimizer, scheduler, dataset_digest, averaged=averaged)


def _warm_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """An exponential moving average that follows the first steps closely: they are far from where training ends."""

    @torch.no_grad()
    def update(averages: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        steps = int(count)
        for average, value in zip(averages, current, strict=True):
            average.lerp_(value, 1 - min(decay, (1 + steps) / (10 + steps)))

    return update
