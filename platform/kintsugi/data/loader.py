"""Training crops and evaluation pairs.

All that is random follows from (seed, epoch, sample id): a run that is resumed, or that goes on with another
number of workers, sees the same crops in the same global batches.
"""

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kintsugi.config import ExperimentConfig
from kintsugi.data.dataset import SplitReader
from kintsugi.data.degradation import Pair, Unit, build_degradation, generator_for
from kintsugi.data.planted import plant_random
from kintsugi.data.sample import Sample
from kintsugi.errors import DataError
from kintsugi.imaging import Image, convert

Key = tuple[int, int] | tuple[int, int, int]
Mask = NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)


class Crops(NamedTuple):
    """One crop, or a batch of them with a leading dimension.

    `degraded` and `clean` are (C, h, w) float32 in [0, 1]. `mask` is (1, h, w) float32 of 0 and 1: the truth,
    for the loss. `mask_known` is 1 where the model may see that mask, 0 where it is withheld or nobody drew one.
    `labelled` is 1 where the mask is the truth, 0 where nobody drew one. `scale` is what brings `clean` back to
    the exposure of the clean image: 1 but with `exposure: keep`.
    """

    degraded: Tensor
    clean: Tensor
    mask: Tensor
    mask_known: Tensor
    labelled: Tensor
    scale: Tensor


class TrainCrops(Dataset[Crops]):
    """Crops by (epoch, index), or (epoch, index, round) where an epoch passes over the data more than once."""

    def __init__(self, reader: SplitReader, config: ExperimentConfig) -> None:
        self.reader = reader
        self.config = config
        self._degradation = build_degradation(config.degradation)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: Key) -> Crops:
        epoch, index, *again = key
        sample = self.reader.sample(index)
        generator = generator_for(self.config.train.seed, epoch, sample.sample_id, *filter(None, again))
        pair, mask = self._crop(sample, generator)
        withheld = generator.random() < self.config.data.mask_dropout
        known = float(sample.mask_known and not withheld)
        return Crops(
            self._tensor(pair.degraded), self._tensor(pair.exposed), torch.from_numpy(mask[None].astype(np.float32)),
            torch.tensor(known), torch.tensor(float(sample.mask_known)), torch.tensor(1 / pair.gain),
        )  # fmt: skip

    def _crop(self, sample: Sample, generator: np.random.Generator) -> tuple[Pair, Mask]:
        data, size = self.config.data, self.config.data.crop
        given = sample.degraded if self.config.degradation.use_given else None
        margin = 0 if given is not None else self._degradation.reach
        top, left = _corner(sample.mask, size, data.defect_crops, generator)
        pose = _Pose(int(generator.integers(4)), bool(generator.integers(2))) if data.flips else _Pose()
        channel = int(generator.integers(3)) if self.config.model.channels == 1 and sample.clean.channels == 3 else None
        window = _Window(sample.clean.size, top - margin, left - margin, size + 2 * margin)

        def cut(image: Image) -> Unit:
            pixels = image.pixels if channel is None else image.pixels[..., channel]
            return pose.apply(window.cut(pixels)).astype(np.float32) / np.float32(image.white_level)

        clean, mask = cut(sample.clean), pose.apply(window.cut(sample.mask))
        if given is not None:
            return Pair(cut(given), clean, 1.0), mask
        if generator.random() < data.planted:
            for _ in range(generator.integers(1, 4)):
                clean, planted = plant_random(clean, generator)
                mask = mask | planted
        # Turned before it is degraded: a preset with horizontal motion stays horizontal.
        pair = self._degradation.pair(clean, generator, sample.clean.white_level)
        if self.config.degradation.exposure == "undo":
            pair = Pair(pair.degraded, clean, 1.0)
        inner = slice(margin, margin + size)
        return Pair(pair.degraded[inner, inner], pair.exposed[inner, inner], pair.gain), mask[inner, inner]

    def _tensor(self, image: Unit) -> Tensor:
        planes = image[None] if image.ndim == 2 else np.moveaxis(image, 2, 0)
        if len(planes) < self.config.model.channels:
            planes = np.repeat(planes, self.config.model.channels, axis=0)
        return torch.from_numpy(np.ascontiguousarray(planes))


class EpochKeys(Sampler[Key]):
    """What one worker loads in one epoch: (epoch, index, round) for each crop, in whole micro-batches.

    A permutation that depends on seed and epoch is passed over until all steps are filled; the round tells how
    often. Of a global batch micro-batch m takes every `parts`-th sample from m on, and worker `rank` takes
    micro-batches rank, rank + world, ...: any number of workers up to `parts` sees the same micro-batches.

    Args:
        count: samples in the split.
        batch: samples of a step, over all workers; a multiple of `parts`.
        steps: of the epoch; default one pass over the data.
        start: steps of the epoch that are done already.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int,
        epoch: int,
        batch: int,
        parts: int = 1,
        rank: int = 0,
        world: int = 1,
        steps: int | None = None,
        start: int = 0,
    ) -> None:
        if count < 1:
            raise DataError("the training split holds no image: build the dataset again")
        if world > parts:
            raise DataError(f"{parts} micro-batches cannot be shared by {world} workers: set train.workers={world}")
        self.parts = range(rank, parts, world)
        self.steps = -(-count // batch) if steps is None else steps
        self._epoch, self._count, self._start = epoch, count, start
        self._order = generator_for(seed, "epoch", epoch).permutation(count)
        self._batch, self._stride = batch, parts

    def __len__(self) -> int:
        return (self.steps - self._start) * len(self.parts) * (self._batch // self._stride)

    def __iter__(self) -> Iterator[Key]:
        for step in range(self._start, self.steps):
            for part in self.parts:
                for place in range(step * self._batch + part, (step + 1) * self._batch, self._stride):
                    yield self._epoch, int(self._order[place % self._count]), place // self._count


def build_train_loader(
    reader: SplitReader, config: ExperimentConfig, *, epoch: int, rank: int = 0, world: int = 1, start: int = 0
) -> DataLoader[Crops]:
    """Micro-batches of `Crops` for one worker and one epoch, see `EpochKeys`.

    Args:
        start: steps of the epoch that are done already.

    Raises:
        DataError: there are more workers than micro-batches in a batch.
    """
    data, train = config.data, config.train
    parts = train.workers * train.micro_batches
    keys = EpochKeys(
        len(reader), seed=train.seed, epoch=epoch, batch=data.batch_size, parts=parts, rank=rank, world=world,
        steps=train.steps_per_epoch, start=start,
    )  # fmt: skip
    return DataLoader(
        TrainCrops(reader, config),
        batch_size=data.batch_size // parts,
        sampler=keys,
        num_workers=data.loader_processes,
        worker_init_fn=_one_thread if data.loader_processes else None,
        multiprocessing_context=_fork_server() if data.loader_processes else None,
        pin_memory=train.gpu and torch.cuda.is_available(),
    )


def evaluation_pair(sample: Sample, config: ExperimentConfig) -> tuple[Image, Image, Mask]:
    """Degraded and clean image, whole and at native resolution, and the defect mask.

    Without a given degraded image it is made with a seed from the sample id alone, so that every epoch,
    process and run scores the same pixels. JPEG becomes PNG, which keeps what the degradation made.
    """
    if sample.degraded is not None and config.degradation.use_given:
        return sample.degraded, sample.clean, sample.mask
    # Nothing is restored of a clean image: its figures would drown the others.
    presets = {name: share for name, share in config.degradation.presets.items() if name != "clean"}
    degradation = build_degradation(config.degradation.model_copy(update={"presets": presets}))
    unit = degradation(sample.clean.to_unit(), generator_for(0, sample.sample_id), sample.clean.white_level)
    lossless = convert(sample.clean, "png") if sample.clean.format == "jpeg" else sample.clean
    return lossless.with_unit(unit), sample.clean, sample.mask


@dataclass(frozen=True)
class _Pose:
    quarter_turns: int = 0
    flipped: bool = False

    def apply(self, image: NDArray[Scalar]) -> NDArray[Scalar]:
        turned = np.rot90(image, self.quarter_turns)
        return turned[:, ::-1] if self.flipped else turned


class _Window:
    """A square that may reach over the border, where the image is mirrored (the border pixel once)."""

    def __init__(self, size: tuple[int, int], top: int, left: int, side: int) -> None:
        rows, columns = (_mirrored(start, side, length) for start, length in zip((top, left), size, strict=True))
        self._places = np.ix_(rows, columns)

    def cut(self, pixels: NDArray[Scalar]) -> NDArray[Scalar]:
        return pixels[self._places]


def _mirrored(start: int, side: int, length: int) -> NDArray[np.intp]:
    period = max(2 * (length - 1), 1)
    places = np.arange(start, start + side) % period
    return np.minimum(places, period - places) if length > 1 else np.zeros(side, np.intp)


def _corner(mask: Mask, size: int, defect_share: float, generator: np.random.Generator) -> tuple[int, int]:
    """Top and left of a crop; with probability `defect_share` it holds a pixel of a defect, if there is one."""
    on_defect = generator.random() < defect_share
    pixel = _defect_pixel(mask, generator) if on_defect and mask.any() else None
    top, left = (_start(mask.shape[a], size, None if pixel is None else pixel[a], generator) for a in (0, 1))
    return top, left


def _defect_pixel(mask: Mask, generator: np.random.Generator) -> tuple[int, int]:
    """A pixel of a defect; each defect is as likely as any other, whatever its size."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    rows, columns = np.nonzero(labels == generator.integers(1, count))
    chosen = generator.integers(len(rows))
    return int(rows[chosen]), int(columns[chosen])


def _start(length: int, size: int, pixel: int | None, generator: np.random.Generator) -> int:
    if length <= size:
        return -((size - length) // 2)
    low, high = 0, length - size
    if pixel is not None:
        low, high = max(low, pixel - size + 1), min(high, pixel)
    return int(generator.integers(low, high, endpoint=True))


def _fork_server() -> BaseContext:
    """A context whose workers are forked from a fresh process.

    Forked from a process that has trained already, they wait for ever on a lock that one of torch's threads held.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _one_thread(_: int) -> None:
    cv2.setNumThreads(1)
