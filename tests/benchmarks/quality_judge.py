"""Runs every method on every trial; in several processes if asked to."""

import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from quality_methods import METHODS, Truth
from quality_tiles import Tiles, Trial

from kintsugi.detection.detectability import Map
from kintsugi.detection.detector import Detector, defect_map, load_detector
from kintsugi.imaging import Image, convert
from kintsugi.metrics import fidelity, psnr
from kintsugi.restore.restorer import Restorer


@dataclass(frozen=True)
class Setting:
    """What is run: picklable, so that each process makes its own tiles, models and detector of it."""

    folder: Path
    split: str
    limit: int | None
    checkpoints: dict[str, Path]
    detector: Path | str | None


@dataclass(frozen=True)
class Task:
    index: int
    preset: str | None
    method: str


@dataclass(frozen=True, eq=False)
class Judged:
    """One output. `figures` are `metrics.Fidelity`'s, those that exist; `clean_psnr` is of the clean image as input."""

    task: Task
    sample_id: str
    group: str
    category: str
    good: bool
    figures: dict[str, float]
    clean_psnr: float | None
    map: Map | None


class Bench:
    """Tiles, methods and detector of one process."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tiles = Tiles(setting.folder, setting.split, setting.limit)
        self._trial: tuple[int, str | None, Trial] | None = None

    @cached_property
    def detector(self) -> Detector | None:
        return None if self.setting.detector is None else load_detector(self.setting.detector)

    @cached_property
    def restorers(self) -> dict[str, Restorer]:
        return {name: Restorer.from_checkpoint(path) for name, path in self.setting.checkpoints.items()}

    def method(self, name: str) -> Callable[[Image, Truth], Image]:
        if name in METHODS:
            return METHODS[name]
        return lambda image, _: self.restore(name, image)

    def restore(self, name: str, image: Image) -> Image:
        """What the model makes of the image alone; one that asks for the defects' mask is told that there are none."""
        restorer = self.restorers[name]
        unknown = np.zeros(image.size, bool) if restorer.model.config.mask == "given" else None
        return restorer.restore(image, unknown).image

    def judge(self, task: Task) -> Judged:
        trial = self.trial(task.index, task.preset)
        method = self.method(task.method)
        output = method(trial.degraded, trial.truth)
        sample, clean = trial.sample, trial.clean.to_unit()
        figures = fidelity(output.to_unit(), clean, sample.mask).to_dict()
        untouched: float | None = None
        if task.preset is None:
            given = convert(trial.clean, "png")
            untouched = psnr(method(given, Truth()).to_unit(), clean)
        return Judged(
            task=task,
            sample_id=sample.sample_id,
            group=sample.part_id,
            category=sample.category,
            good=trial.good,
            figures={name: value for name, value in figures.items() if math.isfinite(value)},
            clean_psnr=untouched,
            map=None if self.detector is None else defect_map(self.detector, output),
        )

    def trial(self, index: int, preset: str | None) -> Trial:
        """The methods meet one trial after the other: it is made once."""
        if self._trial is None or self._trial[:2] != (index, preset):
            self._trial = (index, preset, self.tiles.trial(index, preset))
        return self._trial[2]


def judge_all(setting: Setting, tasks: Sequence[Task], processes: int) -> Iterator[Judged]:
    """In the order of the tasks."""
    if processes == 1:
        bench = Bench(setting)
        yield from map(bench.judge, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _begin, (setting,)) as pool:
        yield from pool.imap(_judge, tasks, chunksize=8)


_BENCH: list[Bench] = []


def _begin(setting: Setting) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    _BENCH[:] = [Bench(setting)]


def _judge(task: Task) -> Judged:
    return _BENCH[0].judge(task)
