"""Whether the time that a search is given holds at least one of its trials."""

import time
from typing import Any

import torch

from kintsugi.config import with_values
from kintsugi.data.dataset import open_split
from kintsugi.errors import ConfigError
from kintsugi.losses import build_loss
from kintsugi.models import PerceptualDistance
from kintsugi.storage import ObjectStore
from kintsugi.training.loop import fit
from kintsugi.training.state import build_state
from kintsugi_tune.ledger import Plan, trial_config

_STEPS = 3


def check_budget(plan: Plan, store: ObjectStore) -> None:
    """Train a few steps here and now, where trials train on CPUs, and hold one trial's steps against the budget.

    What a trial costs beside its steps is not counted: only a budget that cannot suffice is refused.

    Raises:
        ConfigError: one trial alone takes longer than the whole search may.
    """
    search = plan.config.search
    if search.budget_minutes is None or plan.config.train.gpu:
        return
    epochs = search.screen_epochs if search.screened else search.epochs
    minutes = epochs * _epoch_seconds(plan, store) / 60
    if minutes > search.budget_minutes:
        raise ConfigError(
            f"one trial of {epochs} epochs takes about {minutes:.1f} min on this machine, more than the search's "
            f"{search.budget_minutes:g} min: raise --budget-minutes, or lower search.epochs or train.steps_per_epoch"
        )


def _epoch_seconds(plan: Plan, store: ObjectStore) -> float:
    point: dict[str, Any] = next(iter(plan.space.start.values()), {})
    config = trial_config(plan, point, 1)
    short = {"train.steps_per_epoch": _STEPS, "train.validation_images": 1, "train.workers": 1, "train.curriculum": []}
    brief = with_values(config, short)
    train, val = (open_split(store, config.data.dataset, split) for split in ("train", "val"))
    perceptual = PerceptualDistance(brief.loss.perceptual) if brief.loss.weights.perceptual > 0 else None
    threads = torch.get_num_threads()
    torch.set_num_threads(config.train.threads)

    def run() -> float:
        begun = time.monotonic()
        fit(build_state(brief, train.digest), brief, train, val, build_loss(brief.loss, perceptual), lambda *_: None)
        return time.monotonic() - begun

    run()  # loads whatever is loaded only once
    seconds = run()
    torch.set_num_threads(threads)
    steps = config.train.steps_per_epoch or -(-len(train) // config.data.batch_size)
    return seconds * steps / _STEPS / config.train.workers
