"""The training loop in plain PyTorch. Ray passes its own `report`, a test passes `list.append`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kintsugi.config import ExperimentConfig
from kintsugi.data.dataset import SplitReader
from kintsugi.data.loader import build_train_loader, evaluation_pair
from kintsugi.errors import TrainingError
from kintsugi.losses import RestorationLoss
from kintsugi.metrics import align, defect_psnr, psnr, score
from kintsugi.restore.restorer import Restorer
from kintsugi.training.state import TrainState

Report = Callable[[Mapping[str, float], TrainState], None]


@dataclass(frozen=True)
class Worker:
    """One process among `world`; all hold the same model."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def fit(
    state: TrainState,
    config: ExperimentConfig,
    train: SplitReader,
    val: SplitReader,
    loss: RestorationLoss,
    report: Report,
    *,
    model: nn.Module | None = None,
    worker: Worker | None = None,
) -> None:
    """Train until `train.epochs` are done or `train.patience` epochs brought no better score.

    After each epoch `report(metrics, state)` is called on every worker with the same, reduced metrics.

    Args:
        model: what to call for a forward pass, for example DDP around `state.model`; default that itself.
    """
    worker = worker or Worker()
    while state.epoch < config.train.epochs and state.stale < config.train.patience:
        learning_rate = float(state.scheduler.get_last_lr()[0])
        terms = _train_epoch(state, config.at_epoch(state.epoch), train, loss, model or state.model, worker)
        found = _validate(state, config, val, worker)
        state.note(found["score"])
        report({"epoch": state.epoch, "learning_rate": learning_rate, **terms, **found}, state)


def _train_epoch(
    state: TrainState,
    config: ExperimentConfig,
    train: SplitReader,
    loss: RestorationLoss,
    model: nn.Module,
    worker: Worker,
) -> dict[str, float]:
    # Dropout is the only draw from the global generator: seeding it here makes a resumed epoch the same one.
    torch.manual_seed(hash((config.train.seed, state.epoch, worker.rank)) & 0xFFFFFFFF)
    loader = build_train_loader(train, config, epoch=state.epoch, rank=worker.rank, world=worker.world)
    model.train()
    totals: dict[str, Tensor] = {}
    steps = 0
    for batch in islice(loader, config.train.steps_per_epoch):
        degraded, clean, mask, known, labelled, scale = (part.to(worker.device, non_blocking=True) for part in batch)
        terms = loss(model(degraded, mask * known.view(-1, 1, 1, 1), known), clean, mask, labelled, scale)
        state.optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.clip_norm)
        state.optimizer.step()
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        totals = {name: totals.get(name, 0) + value.detach() for name, value in terms.items()}
        steps += 1
    means = _mean_over_workers({f"loss/{name}": float(value) / steps for name, value in totals.items()}, worker)
    if not math.isfinite(means["loss/total"]):
        raise TrainingError(
            f"the loss is no longer finite in epoch {state.epoch + 1}: lower optim.learning_rate or optim.clip_norm"
        )
    return means


def _validate(state: TrainState, config: ExperimentConfig, val: SplitReader, worker: Worker) -> dict[str, float]:
    """Mean figures over the validation images, whole and at native size, each worker taking its share."""
    restorer = Restorer(state.published.eval(), worker.device)
    count = min(len(val), config.train.validation_images or len(val))
    sums = torch.zeros(6, dtype=torch.float64)
    for place in range(worker.rank, count, worker.world):
        # Spread over the split, which may be sorted by category.
        degraded, clean, mask = evaluation_pair(val.sample(place * len(val) // count), config)
        shown = mask if config.model.mask == "given" else None
        reference = clean.to_unit()
        # Only what the score needs: the whole set of figures costs more than the restoration.
        after = align(restorer.restore(degraded, shown).image.to_unit(), reference)
        before = align(degraded.to_unit(), reference)
        value = psnr(after, reference)
        sums[:3] += torch.tensor([1, value, value - psnr(before, reference)], dtype=torch.float64)
        if mask.any():
            value = defect_psnr(after, reference, mask)
            sums[3:] += torch.tensor([1, value, value - defect_psnr(before, reference, mask)], dtype=torch.float64)
    _sum_over_workers(sums, worker)
    images, total, gain, defects, defect_total, defect_gain = sums.tolist()
    figures = {"val/psnr": total / images, "val/psnr_gain": gain / images}
    if defects:
        figures |= {"val/defect_psnr": defect_total / defects, "val/defect_psnr_gain": defect_gain / defects}
    return {**figures, "score": score(gain / images, defect_gain / defects if defects else math.nan)}


def _mean_over_workers(values: dict[str, float], worker: Worker) -> dict[str, float]:
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    _sum_over_workers(sums, worker)
    return dict(zip(values, (sums / worker.world).tolist(), strict=True))


def _sum_over_workers(sums: Tensor, worker: Worker) -> None:
    if worker.world > 1:
        moved = sums.to(worker.device)
        dist.all_reduce(moved)
        sums.copy_(moved)
