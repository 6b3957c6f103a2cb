"""Restorer x dataset -> Scorecard: fidelity of every image, before and after, with confidence bounds."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from kintsugi.config import ExperimentConfig, Split
from kintsugi.data.dataset import SplitReader
from kintsugi.data.loader import evaluation_pair
from kintsugi.metrics import fidelity, score
from kintsugi.pictures import overlay, picture_grid
from kintsugi.restore import Restorer

SHOWN = ("psnr", "ssim", "defect_psnr", "defect_ssim")
"""The figures that tables show, each also `aligned_`; the zeroed ones are for comparison with the seed only."""


class ImageScore(BaseModel):
    """One image: figures of the degraded input and of the restored output against the clean original.

    Defect figures are missing where the image has no defect.
    """

    model_config = ConfigDict(frozen=True)
    sample_id: str
    part_id: str
    category: str
    defect_type: str
    degraded: dict[str, float]
    restored: dict[str, float]
    retention: float
    added: float
    alarm: bool


class Figure(BaseModel):
    """A mean over images with its 95% interval by bootstrap over parts; `count` images had the figure."""

    model_config = ConfigDict(frozen=True)
    degraded: float
    restored: float
    gain: float
    gain_low: float
    gain_high: float
    count: int


class Scorecard(BaseModel):
    """All images, and their figures overall, by category and by defect type.

    `score` is what models are compared by: the smaller of the mean gains in PSNR and in defect PSNR over the
    degraded input, both aligned, in dB; below 0 the model is worse than leaving the images alone.
    """

    model_config = ConfigDict(frozen=True)
    dataset: str
    dataset_digest: str
    split: Split
    model: str
    score: float
    overall: dict[str, Figure]
    by_category: dict[str, dict[str, Figure]]
    by_defect_type: dict[str, dict[str, Figure]]
    images: tuple[ImageScore, ...]


def evaluate(
    restorer: Restorer,
    reader: SplitReader,
    config: ExperimentConfig,
    *,
    dataset: str,
    split: Split,
    model: str,
    give_mask: bool = False,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scorecard:
    """Restore each image of a split and score it.

    The mask reaches the model only with `give_mask`, or where the model cannot do without.
    """
    count = min(len(reader), limit or len(reader))
    images: list[ImageScore] = []
    for index in range(count):
        images.append(_score(restorer, reader, config, index, give_mask))
        if progress is not None:
            progress(index + 1, count)
    return summarise(images, dataset=dataset, dataset_digest=reader.digest, split=split, model=model)


def summarise(
    images: Sequence[ImageScore], *, dataset: str, dataset_digest: str, split: Split, model: str
) -> Scorecard:
    overall = _figures(images)
    defect = overall.get("aligned_defect_psnr")
    return Scorecard(
        dataset=dataset,
        dataset_digest=dataset_digest,
        split=split,
        model=model,
        score=score(overall["aligned_psnr"].gain, defect.gain if defect else math.nan),
        overall=overall,
        by_category={name: _figures(part) for name, part in _grouped(images, lambda i: i.category)},
        by_defect_type={name: _figures(part) for name, part in _grouped(images, lambda i: i.defect_type)},
        images=tuple(images),
    )


def draw(
    restorer: Restorer,
    reader: SplitReader,
    config: ExperimentConfig,
    card: Scorecard,
    path: Path,
    *,
    count: int = 6,
    give_mask: bool = False,
) -> Path:
    """A picture of the images with the smallest gains: degraded, restored, clean with the defect outlined."""
    worst = sorted(card.images, key=lambda i: i.restored["aligned_psnr"] - i.degraded["aligned_psnr"])
    rows, titles = [], []
    for image in sorted(worst, key=lambda i: "defect_psnr" not in i.restored)[:count]:
        sample = reader.sample(reader.sample_ids.index(image.sample_id))
        degraded, clean, mask = evaluation_pair(sample, config)
        restored = restorer.restore(degraded, mask if _shows_mask(restorer, give_mask) else None).image
        rows.append([degraded.to_unit(), restored.to_unit(), clean.to_unit(), overlay(clean.to_unit(), mask)])
        titles.append(_title(image))
    return picture_grid(rows, ["degraded", "restored", "clean", "defect"], titles, path)


def _score(
    restorer: Restorer, reader: SplitReader, config: ExperimentConfig, index: int, give_mask: bool
) -> ImageScore:
    sample = reader.sample(index)
    degraded, clean, mask = evaluation_pair(sample, config)
    restoration = restorer.restore(degraded, mask if _shows_mask(restorer, give_mask) else None)
    reference = clean.to_unit()
    before, after = (fidelity(image.to_unit(), reference, mask).to_dict() for image in (degraded, restoration.image))
    return ImageScore(
        sample_id=sample.sample_id,
        part_id=sample.part_id,
        category=sample.category,
        defect_type=sample.defect_type,
        degraded=_finite(before),
        restored=_finite(after),
        retention=restoration.report.retention,
        added=restoration.report.added,
        alarm=restoration.report.alarm,
    )


def _shows_mask(restorer: Restorer, give_mask: bool) -> bool:
    return give_mask or restorer.model.config.mask == "given"


def _finite(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _grouped(images: Sequence[ImageScore], key: Callable[[ImageScore], str]) -> Iterable[tuple[str, list[ImageScore]]]:
    for name in sorted({key(image) for image in images}):
        yield name, [image for image in images if key(image) == name]


def _figures(images: Sequence[ImageScore]) -> dict[str, Figure]:
    names = sorted({name for image in images for name in image.restored})
    return {name: _figure([image for image in images if name in image.restored], name) for name in names}


def _figure(images: Sequence[ImageScore], name: str) -> Figure:
    before = np.array([image.degraded[name] for image in images])
    after = np.array([image.restored[name] for image in images])
    low, high = bootstrap(after - before, [image.part_id for image in images])
    return Figure(
        degraded=float(before.mean()),
        restored=float(after.mean()),
        gain=float((after - before).mean()),
        gain_low=low,
        gain_high=high,
        count=len(images),
    )


def bootstrap(values: np.ndarray, groups: Sequence[str], *, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean when whole groups are drawn with replacement.

    Images of one part are not independent; resampling images would make the interval too narrow.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    chosen = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _title(image: ImageScore) -> str:
    gain = image.restored["aligned_psnr"] - image.degraded["aligned_psnr"]
    return f"{image.sample_id}\n{image.defect_type}  {gain:+.1f} dB"
