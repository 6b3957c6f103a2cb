"""TrainState: all that changes while a model trains, and its way to a checkpoint and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from kintsugi.checkpoint import load_checkpoint, load_train_state, load_weights, save_checkpoint
from kintsugi.config import ExperimentConfig
from kintsugi.errors import TrainingError
from kintsugi.models import RestorationUNet, build_model


@dataclass
class TrainState:
    """`epoch` is the number of finished epochs; `stale` counts those since the best score.

    No generator is kept: order, crops, degradations and dropout are functions of (seed, epoch, rank, sample).
    """

    model: RestorationUNet
    optimizer: Optimizer
    scheduler: CosineAnnealingWarmRestarts
    dataset_digest: str
    epoch: int = 0
    best: float = float("-inf")
    stale: int = 0

    def note(self, score: float) -> None:
        """Count an epoch that ended with `score`."""
        self.epoch += 1
        self.scheduler.step()
        self.stale = 0 if score > self.best else self.stale + 1
        self.best = max(self.best, score)

    def save(
        self, folder: Path, config: ExperimentConfig, metrics: Mapping[str, float], card: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint that both resumes and restores."""
        progress = {"epoch": self.epoch, "best": self.best, "stale": self.stale, "dataset_digest": self.dataset_digest}
        live = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        save_checkpoint(folder, self.model, config, metrics, card, {**progress, **live})

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of the same data and model.

        Raises:
            TrainingError: the checkpoint was trained on another dataset.
            IntegrityError: its files are damaged or its weights do not fit.
        """
        checkpoint = load_checkpoint(folder)
        saved = load_train_state(checkpoint)
        if saved["dataset_digest"] != self.dataset_digest:
            raise TrainingError(
                f"the run was trained on dataset {saved['dataset_digest'][:12]} and now finds "
                f"{self.dataset_digest[:12]}: name the old one as data.dataset, or start a run under a new name"
            )
        load_weights(self.model, checkpoint)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.epoch, self.best, self.stale = saved["epoch"], saved["best"], saved["stale"]


def build_state(config: ExperimentConfig, dataset_digest: str, device: torch.device | str = "cpu") -> TrainState:
    """A fresh state; the weights are a function of `train.seed`."""
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(device)
    optim = config.optim
    optimizer = AdamW(model.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay)
    scheduler = CosineAnnealingWarmRestarts(
        optimizer, optim.restart_epochs, optim.restart_factor, eta_min=optim.min_learning_rate
    )
    return TrainState(model, optimizer, scheduler, dataset_digest)
