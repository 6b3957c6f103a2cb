"""Restorer x dataset -> Scorecard: fidelity of every image, before and after, with confidence bounds."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from kintsugi.config import ExperimentConfig
from kintsugi.data.dataset import SplitReader
from kintsugi.data.degradation import build_degradation
from kintsugi.data.loader import evaluation_pair
from kintsugi.data.sample import GOOD, Sample
from kintsugi.detection.detectability import Detectability, Map, measure_detectability
from kintsugi.detection.detector import Detector, defect_map
from kintsugi.errors import DataError, KintsugiError
from kintsugi.evaluation.survival import SurvivalCurve, measure_survival
from kintsugi.imaging import Image
from kintsugi.metrics import Lpips, align, fidelity, score
from kintsugi.pictures import overlay, picture_grid
from kintsugi.restore.restorer import Restorer
from kintsugi.sections import Split

Mask = NDArray[np.bool_]

SHOWN = ("psnr", "ssim", "defect_psnr", "defect_ssim")
"""The figures that tables show, each also `aligned_`; the zeroed ones are for comparison with the seed only."""

CLIPPED: Mapping[str, tuple[float, float]] = {"contrast_kept": (0, 1), "small_contrast_kept": (0, 1)}
"""Figures clipped for each image before the mean is taken: a defect drawn too strongly pays for no lost one."""


class ImageScore(BaseModel):
    """One image: figures of the degraded input and of the restored output against the clean original.

    Defect figures are missing where the image has no defect. `preset` names the degradation where that is known;
    `report` is all that the restorer said of its own output.
    """

    model_config = ConfigDict(frozen=True)
    sample_id: str
    part_id: str
    category: str
    defect_type: str
    preset: str | None = None
    degraded: dict[str, float]
    restored: dict[str, float]
    retention: float
    added: float
    alarm: bool
    report: dict[str, JsonValue] = Field(default_factory=dict)


class Figure(BaseModel):
    """Means over images; `low` and `high` bound them in 95% of bootstrap draws over parts. `count` images had it."""

    model_config = ConfigDict(frozen=True)
    degraded: float
    restored: float
    restored_low: float
    restored_high: float
    gain: float
    gain_low: float
    gain_high: float
    count: int


class Scorecard(BaseModel):
    """All images, and their figures overall, by category, by defect type and by preset.

    `score` is what models are compared by: the smaller of the mean gains in PSNR and in defect PSNR over the
    degraded input, both aligned, in dB; below 0 the model is worse than leaving the images alone.
    `detectability` needs a detector; `precision_recall` then holds (recall, precision) points over all pixels for
    clean, degraded and restored. `absent` says why a figure that could be wanted is missing.
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
    by_preset: dict[str, dict[str, Figure]] = Field(default_factory=dict)
    detectability: Detectability | None = None
    precision_recall: dict[str, tuple[tuple[float, float], ...]] = Field(default_factory=dict)
    survival: SurvivalCurve | None = None
    absent: dict[str, str] = Field(default_factory=dict)
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
    detector: Detector | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scorecard:
    """Restore each image of a split and score it.

    The mask reaches the model only with `give_mask`, or where the model cannot do without. With a `detector`,
    12 bytes a pixel of all images are held for its maps.
    """
    count = min(len(reader), limit or len(reader))
    perceptual, absent = _perceptual()
    maps = _Maps()
    images: list[ImageScore] = []
    for index in range(count):
        trio = _restored(restorer, reader.sample(index), config, give_mask)
        images.append(_score(trio, config, perceptual))
        if detector is not None:
            maps.add(detector, trio)
        if progress is not None:
            progress(index + 1, count)
    found = maps.measured(absent) if detector is not None else None
    curves = maps.curves() if found is not None else {}
    card = summarise(images, dataset=dataset, dataset_digest=reader.digest, split=split, model=model)
    return card.model_copy(update={"detectability": found, "precision_recall": curves, "absent": absent})


def planted_survival(
    restorer: Restorer, reader: SplitReader, config: ExperimentConfig, *, limit: int | None = None
) -> SurvivalCurve:
    """What the restorer keeps of spots planted in the split's defect-free images, degraded as in training.

    Raises:
        DataError: the split has no defect-free image.
    """
    samples = (reader.sample(index) for index in range(len(reader)))
    good = ((sample.sample_id, sample.clean) for sample in samples if sample.defect_type == GOOD)

    def restore(image: Image) -> Image:
        none = np.zeros(image.size, np.bool_) if _shows_mask(restorer, False) else None
        return restorer.restore(image, none).image

    curve = measure_survival(islice(good, limit), build_degradation(config.degradation), restore)
    if not curve.images:
        raise DataError("the split has no defect-free image to plant defects in: choose another split")
    return curve


def summarise(
    images: Sequence[ImageScore], *, dataset: str, dataset_digest: str, split: Split, model: str
) -> Scorecard:
    overall = figures(images)
    defect = overall.get("aligned_defect_psnr")
    return Scorecard(
        dataset=dataset,
        dataset_digest=dataset_digest,
        split=split,
        model=model,
        score=score(overall["aligned_psnr"].gain, defect.gain if defect else math.nan),
        overall=overall,
        by_category=_by(images, lambda i: i.category),
        by_defect_type=_by(images, lambda i: i.defect_type),
        by_preset=_by(images, lambda i: i.preset),
        images=tuple(images),
    )


def worst_first(images: Iterable[ImageScore]) -> list[ImageScore]:
    """By the smaller of the aligned gains in PSNR and in defect PSNR."""
    return sorted(images, key=worse_gain)


def worse_gain(image: ImageScore) -> float:
    """The smaller of the aligned gains in PSNR and in defect PSNR, dB."""
    gain, defect = (_gain(image, name) for name in ("aligned_psnr", "aligned_defect_psnr"))
    return score(gain, defect)


@dataclass(frozen=True)
class Pictured:
    """One image to look at; all arrays are in [0, 1]."""

    score: ImageScore
    degraded: Map
    restored: Map
    clean: Map
    mask: Mask


def pictured(
    restorer: Restorer,
    reader: SplitReader,
    config: ExperimentConfig,
    images: Iterable[ImageScore],
    *,
    give_mask: bool = False,
) -> Iterator[Pictured]:
    """Restore the images of a scorecard again, one by one, to look at them."""
    for image in images:
        trio = _restored(restorer, reader.sample(reader.sample_ids.index(image.sample_id)), config, give_mask)
        yield Pictured(image, trio.degraded.to_unit(), trio.restored.to_unit(), trio.clean.to_unit(), trio.mask)


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
    rows, titles = [], []
    for shown in pictured(restorer, reader, config, worst_first(card.images)[:count], give_mask=give_mask):
        rows.append([shown.degraded, shown.restored, shown.clean, overlay(shown.clean, shown.mask)])
        titles.append(f"{shown.score.sample_id}\n{shown.score.defect_type}  {worse_gain(shown.score):+.1f} dB")
    return picture_grid(rows, ["degraded", "restored", "clean", "defect"], titles, path)


@dataclass(frozen=True)
class _Trio:
    """A sample, its three images, and what the restorer said."""

    sample: Sample
    degraded: Image
    restored: Image
    clean: Image
    mask: Mask
    retention: float
    added: float
    alarm: bool
    report: dict[str, JsonValue]


def _restored(restorer: Restorer, sample: Sample, config: ExperimentConfig, give_mask: bool) -> _Trio:
    degraded, clean, mask = evaluation_pair(sample, config)
    restoration = restorer.restore(degraded, mask if _shows_mask(restorer, give_mask) else None)
    said = restoration.report
    return _Trio(
        sample, degraded, restoration.image, clean, mask, said.retention, said.added, said.alarm, said.to_dict()
    )


def _score(trio: _Trio, config: ExperimentConfig, perceptual: Lpips | None) -> ImageScore:
    sample = trio.sample
    before, after = (_measured(image, trio, perceptual) for image in (trio.degraded, trio.restored))
    return ImageScore(
        sample_id=sample.sample_id,
        part_id=sample.part_id,
        category=sample.category,
        defect_type=sample.defect_type,
        preset=_preset(sample, config),
        degraded=before,
        restored=after,
        retention=trio.retention,
        added=trio.added,
        alarm=trio.alarm,
        report=trio.report,
    )


def _measured(image: Image, trio: _Trio, perceptual: Lpips | None) -> dict[str, float]:
    output, clean = image.to_unit(), trio.clean.to_unit()
    figures = fidelity(output, clean, trio.mask).to_dict()
    if perceptual is not None:
        figures |= {"lpips": perceptual(output, clean), "aligned_lpips": perceptual(align(output, clean), clean)}
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _perceptual() -> tuple[Lpips | None, dict[str, str]]:
    try:
        return Lpips(), {}
    except KintsugiError as error:
        return None, {"lpips": str(error)}


def _preset(sample: Sample, config: ExperimentConfig) -> str | None:
    if sample.degraded is not None and config.degradation.use_given:
        return sample.preset
    names = list(config.degradation.presets)
    return names[0] if len(names) == 1 else None


@dataclass
class _Maps:
    """A detector's maps of the images so far."""

    samples: list[Sample] = field(default_factory=list)
    masks: list[Mask | None] = field(default_factory=list)
    maps: dict[str, list[Map]] = field(default_factory=lambda: {"clean": [], "degraded": [], "restored": []})

    def add(self, detector: Detector, trio: _Trio) -> None:
        self.samples.append(trio.sample)
        self.masks.append(trio.mask if trio.sample.mask_known else None)
        for name, image in (("clean", trio.clean), ("degraded", trio.degraded), ("restored", trio.restored)):
            self.maps[name].append(defect_map(detector, image))

    def measured(self, absent: dict[str, str]) -> Detectability | None:
        """The result, or None with the reason noted in `absent`."""
        free = [sample.defect_type == GOOD for sample in self.samples]
        groups = [sample.part_id for sample in self.samples]
        try:
            clean, degraded, restored = (self.maps[name] for name in ("clean", "degraded", "restored"))
            return measure_detectability(clean, degraded, restored, self.masks, free, groups=groups)
        except DataError as error:
            absent["detectability"] = str(error)
            return None

    def curves(self) -> dict[str, tuple[tuple[float, float], ...]]:
        return {name: _precision_recall(maps, self.masks) for name, maps in self.maps.items()}


def _precision_recall(
    maps: Sequence[Map], masks: Sequence[Mask | None], points: int = 101
) -> tuple[tuple[float, float], ...]:
    """(recall, precision) at evenly spaced recalls over the pixels of all images; empty without a defect."""
    known = [(scores, mask) for scores, mask in zip(maps, masks, strict=True) if mask is not None]
    defect = np.sort(np.concatenate([scores[mask] for scores, mask in known]))
    if not len(defect):
        return ()
    levels = defect[np.linspace(len(defect) - 1, 0, points).astype(np.intp)]
    alarms = np.zeros(points + 1, np.int64)
    for scores, mask in known:
        reached = np.searchsorted(levels[::-1], scores[~mask], side="right")
        alarms += np.bincount(reached, minlength=points + 1)
    false = alarms[::-1].cumsum()[:-1]
    true = len(defect) - np.searchsorted(defect, levels, side="left")
    return tuple((float(t / len(defect)), float(t / (t + f))) for t, f in zip(true, false, strict=True))


def _shows_mask(restorer: Restorer, give_mask: bool) -> bool:
    return give_mask or restorer.model.config.mask == "given"


def _gain(image: ImageScore, name: str) -> float:
    return image.restored[name] - image.degraded[name] if name in image.restored else math.nan


def _by(images: Sequence[ImageScore], key: Callable[[ImageScore], str | None]) -> dict[str, dict[str, Figure]]:
    """Figures of each group; images without a key are in none."""
    names = sorted({name for image in images if (name := key(image)) is not None})
    return {name: figures([image for image in images if key(image) == name]) for name in names}


def figures(images: Sequence[ImageScore]) -> dict[str, Figure]:
    """Of each figure its means over the images that have it on both sides, with bootstrap intervals over parts."""
    names = sorted({name for image in images for name in image.restored if name in image.degraded})
    return {
        name: _figure([image for image in images if name in image.restored and name in image.degraded], name)
        for name in names
    }


def _figure(images: Sequence[ImageScore], name: str) -> Figure:
    limits = CLIPPED.get(name, (-math.inf, math.inf))
    before = np.array([image.degraded[name] for image in images]).clip(*limits)
    after = np.array([image.restored[name] for image in images]).clip(*limits)
    parts = [image.part_id for image in images]
    (restored_low, restored_high), (gain_low, gain_high) = bootstrap(after, parts), bootstrap(after - before, parts)
    return Figure(
        degraded=float(before.mean()),
        restored=float(after.mean()),
        restored_low=restored_low,
        restored_high=restored_high,
        gain=float((after - before).mean()),
        gain_low=gain_low,
        gain_high=gain_high,
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
