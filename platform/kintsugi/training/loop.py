"""The training loop in plain PyTorch. Ray passes its own `report`, a test passes `list.append`."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from kintsugi.config import ExperimentConfig
from kintsugi.data.dataset import SplitReader
from kintsugi.data.loader import Crops, EpochKeys, build_train_loader, evaluation_pair
from kintsugi.errors import TrainingError
from kintsugi.losses import RestorationLoss
from kintsugi.metrics import align, defect_psnr, psnr, score
from kintsugi.models import Prediction
from kintsugi.restore.restorer import Restorer
from kintsugi.training.state import TrainState

Report = Callable[[Mapping[str, float], TrainState], None]
Save = Callable[[TrainState], None]
Pictures = list[list[NDArray[Any]]]
Show = Callable[[Pictures, int], None]
_SHOWN, _SHOWN_PX = 4, 256
_POLL_STEPS = 10
"""How often workers ask each other whether one must save at once: asking makes them wait for each other."""


@dataclass(frozen=True)
class Worker:
    """One process among `world`; all hold the same model.

    `urgent` tells that this process will soon be taken away: then all save as soon as they have agreed on it.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    urgent: Callable[[], bool] | None = None


def fit(
    state: TrainState,
    config: ExperimentConfig,
    train: SplitReader,
    val: SplitReader,
    loss: RestorationLoss,
    report: Report,
    *,
    save: Save | None = None,
    show: Show | None = None,
    model: nn.Module | None = None,
    worker: Worker | None = None,
) -> None:
    """Train until `train.epochs` are done, `train.patience` epochs brought no better score, or time is up.

    After each epoch `report(metrics, state)` is called on every worker with the same, reduced metrics.

    Args:
        save: called on every worker, after the same step, when a checkpoint within an epoch is due.
        show: called after each epoch with rows of pictures (degraded, restored, clean) of some of this worker's
            validation images, at native resolution, and the epoch.
        model: what to call for a forward pass, for example DDP around `state.model`; default that itself.
    """
    worker = worker or Worker()
    minutes = config.train.max_minutes
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    epochs = _Epochs(loss, model or state.model, worker, save, deadline, _Timer(config.train.checkpoint_minutes))
    if config.train.compile:
        epochs = replace(epochs, model=cast(nn.Module, torch.compile(epochs.model)))
    while state.epoch < config.train.epochs and state.stale < config.train.patience:
        learning_rate = float(state.scheduler.get_last_lr()[0])
        terms = epochs.run(state, config.at_epoch(state.epoch), train)
        if terms is None:
            return
        pictures: Pictures = []
        found = _validate(state, config, val, worker, None if show is None else pictures)
        state.note(found["score"])
        if show is not None:
            show(pictures, state.epoch)
        report({"epoch": state.epoch, "learning_rate": learning_rate, **terms, **found}, state)
        epochs.timer.restart()
        if epochs.late():
            return


@dataclass
class _Timer:
    """Tells when the last save is `minutes` ago."""

    minutes: float | None
    last: float = field(default_factory=time.monotonic)

    def __call__(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.last >= 60 * self.minutes

    def restart(self) -> None:
        self.last = time.monotonic()


@dataclass(frozen=True)
class _Epochs:
    """Runs epochs, from wherever the state stands."""

    loss: RestorationLoss
    model: nn.Module
    worker: Worker
    save: Save | None
    deadline: float
    timer: _Timer

    def run(self, state: TrainState, config: ExperimentConfig, train: SplitReader) -> dict[str, float] | None:
        """Mean loss terms of the epoch over all workers; None where time ran out within it."""
        worker, names = self.worker, [*self.loss.weights, "total"]
        loader = build_train_loader(
            train, config, epoch=state.epoch, rank=worker.rank, world=worker.world, start=state.step
        )
        keys = cast(EpochKeys, loader.sampler)
        sums = _own_share(state.sums, len(names), worker)
        self.model.train()
        batches = iter(loader)
        while state.step < keys.steps:
            sums += self._step(state, config, list(keys.parts), islice(batches, len(keys.parts)))
            if state.step < keys.steps and self._due(state, config):
                state.sums = _gathered(sums, worker)
                _means(names, state)
                assert self.save is not None
                self.save(state)
                self.timer.restart()
                if self.late():
                    return None
        state.sums = _gathered(sums, worker)
        return _means(names, state)

    def late(self) -> bool:
        """Whether time is up, for all workers alike."""
        return self.deadline < math.inf and _any(time.monotonic() > self.deadline, self.worker)

    def _step(self, state: TrainState, config: ExperimentConfig, parts: list[int], batches: Iterator[Crops]) -> Tensor:
        """One step of the optimizer; this worker's share of the loss terms, on its device."""
        count = config.train.workers * config.train.micro_batches
        state.optimizer.zero_grad(set_to_none=True)
        sums: Tensor | None = None
        for part, batch in zip(parts, batches, strict=True):
            # Dropout is all that draws from the global generator: seeded so, it does not depend on who runs the part.
            torch.manual_seed(hash((config.train.seed, state.epoch, state.step, part)) & 0xFFFFFFFF)
            with self._synchronised(part == parts[-1]):
                terms = self._loss(config, batch)
                # DDP takes the mean over workers, of which some may have run more parts than others.
                (terms["total"] * (self.worker.world / count)).backward()
            values = torch.stack([value.detach().double() for value in terms.values()]) / count
            sums = values if sums is None else sums + values
        nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.clip_norm)
        state.optimizer.step()
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        state.step += 1
        assert sums is not None
        return sums

    def _loss(self, config: ExperimentConfig, batch: Crops) -> dict[str, Tensor]:
        device = self.worker.device
        degraded, clean, mask, known, labelled, scale = (part.to(device, non_blocking=True) for part in batch)
        degraded = degraded.contiguous(memory_format=torch.channels_last)
        precision = config.train.precision
        half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            image, *maps = self.model(degraded, mask * known.view(-1, 1, 1, 1), known)
        # Losses are differences of near equals: bf16 has 8 bits for them.
        answer = Prediction(image.float(), *(None if part is None else part.float() for part in maps))
        return self.loss(answer, clean, mask, labelled, scale)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients travel between workers once a step, with the last micro-batch."""
        no_sync = getattr(self.model, "no_sync", None)
        return contextlib.nullcontext() if last or no_sync is None else no_sync()

    def _due(self, state: TrainState, config: ExperimentConfig) -> bool:
        """Whether a checkpoint within the epoch is due, for all workers alike."""
        if self.save is None:
            return False
        every = config.train.checkpoint_steps
        if every is not None and state.step % every == 0:
            return True
        urgent = self.worker.urgent
        if (urgent is None and self.timer.minutes is None) or state.step % _POLL_STEPS:
            return False
        return _any(self.timer() or (urgent is not None and urgent()), self.worker)


def _own_share(sums: Tensor | None, terms: int, worker: Worker) -> Tensor:
    """What this worker's loss terms add up to so far; under another number of workers the first has it all."""
    if sums is None:
        return torch.zeros(terms, dtype=torch.float64, device=worker.device)
    if len(sums) != worker.world:
        sums = torch.cat([sums.sum(0, keepdim=True), torch.zeros(worker.world - 1, terms, dtype=torch.float64)])
    return sums[worker.rank].to(worker.device, copy=True)


def _gathered(sums: Tensor, worker: Worker) -> Tensor:
    """(world, terms), on the CPU."""
    if worker.world == 1:
        return sums[None].cpu()
    rows = [torch.empty_like(sums) for _ in range(worker.world)]
    dist.all_gather(rows, sums)
    return torch.stack(rows).cpu()


def _means(names: list[str], state: TrainState) -> dict[str, float]:
    """Mean loss terms over the steps that are done and over all workers."""
    assert state.sums is not None
    values = (state.sums.sum(0) / state.step).tolist()
    means = {f"loss/{name}": value for name, value in zip(names, values, strict=True)}
    if not math.isfinite(means["loss/total"]):
        raise TrainingError(
            f"the loss is no longer finite in epoch {state.epoch + 1}: lower optim.learning_rate or optim.clip_norm"
        )
    return means


def _validate(
    state: TrainState, config: ExperimentConfig, val: SplitReader, worker: Worker, pictures: Pictures | None = None
) -> dict[str, float]:
    """Mean figures over the validation images, whole and at native size, each worker taking its share."""
    restorer = Restorer(state.published.eval(), worker.device)
    count = min(len(val), config.train.validation_images or len(val))
    sums = torch.zeros(6, dtype=torch.float64)
    own = range(worker.rank, count, worker.world)
    shown_places = {own[i * len(own) // _SHOWN] for i in range(_SHOWN)} if own else set[int]()
    for place in own:
        # Spread over the split, which may be sorted by category.
        degraded, clean, mask = evaluation_pair(val.sample(place * len(val) // count), config)
        shown = mask if config.model.mask == "given" else None
        reference = clean.to_unit()
        # Only what the score needs: the whole set of figures costs more than the restoration.
        restored = restorer.restore(degraded, shown).image.to_unit()
        after = align(restored, reference)
        before = align(degraded.to_unit(), reference)
        value = psnr(after, reference)
        sums[:3] += torch.tensor([1, value, value - psnr(before, reference)], dtype=torch.float64)
        if mask.any():
            value = defect_psnr(after, reference, mask)
            sums[3:] += torch.tensor([1, value, value - defect_psnr(before, reference, mask)], dtype=torch.float64)
        if pictures is not None and place in shown_places:
            pictures.append(_cut(mask, degraded.to_unit(), restored, reference))
    _sum_over_workers(sums, worker)
    images, total, gain, defects, defect_total, defect_gain = sums.tolist()
    figures = {"val/psnr": total / images, "val/psnr_gain": gain / images}
    if defects:
        figures |= {"val/defect_psnr": defect_total / defects, "val/defect_psnr_gain": defect_gain / defects}
    return {**figures, "score": score(gain / images, defect_gain / defects if defects else math.nan)}


def _cut(mask: NDArray[np.bool_], *images: NDArray[Any]) -> list[NDArray[Any]]:
    """The same window of each image, around a defect if there is one: enough to see, and little to send."""
    rows, columns = np.nonzero(mask)
    middle = (rows[len(rows) // 2], columns[len(rows) // 2]) if len(rows) else (mask.shape[0] // 2, mask.shape[1] // 2)
    top, left = (max(0, min(m - _SHOWN_PX // 2, n - _SHOWN_PX)) for m, n in zip(middle, mask.shape, strict=True))
    return [image[top : top + _SHOWN_PX, left : left + _SHOWN_PX].copy() for image in images]


def _any(flag: bool, worker: Worker) -> bool:
    """Whether it holds for any worker."""
    count = torch.tensor([float(flag)], dtype=torch.float64)
    _sum_over_workers(count, worker)
    return bool(count.item())


def _sum_over_workers(sums: Tensor, worker: Worker) -> None:
    if worker.world > 1:
        moved = sums.to(worker.device)
        dist.all_reduce(moved)
        sums.copy_(moved)
