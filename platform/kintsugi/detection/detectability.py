"""How well the defects of a restored image can still be found: average precision, recall, false alarms.

Works on a detector's maps, (H, W) float32 in [0, 1], of the clean, the degraded and the restored images of a split;
see `kintsugi.detection` for the detectors.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import ndimage

from kintsugi.errors import DataError

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]

_EIGHT = np.ones((3, 3), np.bool_)
_NEAR = 8
"""Pixels this close to a defect are no background: where exactly a drawn mask ends is nobody's business."""


class Bounds(BaseModel):
    """A 95% interval by bootstrap over groups."""

    model_config = ConfigDict(frozen=True)
    low: float
    high: float


class Detectability(BaseModel):
    """What a detector trained on clean images finds in the clean, the degraded and the restored ones.

    Attributes:
        clean_ap, degraded_ap, restored_ap: average precision over all pixels; absent without a defect.
        recovered: (restored - degraded) / (clean - degraded), 1 when restoring made up for all that was lost;
            absent where degrading cost nothing. `recovered_bounds` needs the groups.
        clean_image_ap, degraded_image_ap, restored_image_ap, image_recovered: the same with the average precision
            of each image that has a defect by itself, and then their mean, in which small defects weigh as much as
            large ones.
        threshold: at which the share `false_alarm_share` of background pixels of the clean images is exceeded.
        clean_recall, degraded_recall, restored_recall: share of defects (connected regions of the masks) of which
            at least `min_area` px, or all, exceed the threshold.
        degraded_rise, restored_rise: share of defect-free images with more false alarms (connected regions of at
            least `min_area` px above the threshold) than their own clean image has; `restored_rise` is the
            hallucination rate. Absent without a defect-free image.
    """

    model_config = ConfigDict(frozen=True)
    clean_ap: float | None
    degraded_ap: float | None
    restored_ap: float | None
    recovered: float | None
    recovered_bounds: Bounds | None
    clean_image_ap: float | None
    degraded_image_ap: float | None
    restored_image_ap: float | None
    image_recovered: float | None
    threshold: float
    false_alarm_share: float
    min_area: int
    clean_recall: float | None
    degraded_recall: float | None
    restored_recall: float | None
    degraded_rise: float | None
    restored_rise: float | None
    images: int
    defects: int
    defect_free_images: int


def average_precision(scores: Iterable[Map], masks: Sequence[Mask]) -> float:
    """Area under the precision-recall steps over the pixels of all images, exact, NaN without a defect.

    Sum of (R_n - R_{n-1}) P_n over the distinct scores, ties counted together, as scikit-learn defines it. Only
    the scores of defect pixels are kept in memory; `scores` is passed over twice, so it is no generator.
    """
    levels, found = np.unique(
        np.concatenate([s[m] for s, m in zip(scores, masks, strict=True)] or [np.zeros(0, np.float32)]),
        return_counts=True,
    )
    if not len(levels):
        return math.nan
    alarms = np.zeros(len(levels) + 1, np.int64)
    for score, mask in zip(scores, masks, strict=True):
        # How many levels a background pixel reaches; at each of these it is a false alarm.
        reached = np.searchsorted(levels, score[~mask], side="right")
        alarms += np.bincount(reached, minlength=len(alarms))
    true = np.cumsum(found[::-1])
    false = np.cumsum(alarms[1:][::-1])
    return float(np.sum(found[::-1] / true[-1] * (true / (true + false))))


def measure_detectability(
    clean: Sequence[Map],
    degraded: Sequence[Map],
    restored: Sequence[Map],
    masks: Sequence[Mask | None],
    defect_free: Sequence[bool],
    *,
    groups: Sequence[str] | None = None,
    false_alarm_share: float = 0.001,
    min_area: int = 4,
) -> Detectability:
    """Compare a detector's maps of the same images in three states.

    Args:
        masks: the defects, all False where there is none; None where nobody looked, and that image is left out.
        defect_free: True for an image that somebody called good, which alone counts for false alarms.
        groups: the part of each image, for the interval of `recovered`.

    Raises:
        DataError: no image was looked at.
    """
    known = [i for i, mask in enumerate(masks) if mask is not None]
    if not known:
        raise DataError("no image says where its defects are: detectability needs labelled images")
    truth = [mask for mask in masks if mask is not None]
    kept = [[maps[i] for i in known] for maps in (clean, degraded, restored)]
    threshold = _threshold(kept[0], truth, false_alarm_share)
    before, between, after = (average_precision(maps, truth) for maps in kept)
    before_each, between_each, after_each = (_mean_ap(maps, truth) for maps in kept)
    recalls = [_hits(maps, truth, threshold, min_area) for maps in kept]
    free = [i for i, place in enumerate(known) if defect_free[place]]
    alarms = [[_regions(maps[i] > threshold, min_area) for i in free] for maps in kept]
    bounds = None if groups is None else _recovered_bounds(kept, truth, [groups[i] for i in known])
    return Detectability(
        clean_ap=_given(before),
        degraded_ap=_given(between),
        restored_ap=_given(after),
        recovered=_given(_recovered(before, between, after)),
        recovered_bounds=bounds,
        clean_image_ap=_given(before_each),
        degraded_image_ap=_given(between_each),
        restored_image_ap=_given(after_each),
        image_recovered=_given(_recovered(before_each, between_each, after_each)),
        threshold=threshold,
        false_alarm_share=false_alarm_share,
        min_area=min_area,
        clean_recall=_mean(recalls[0]),
        degraded_recall=_mean(recalls[1]),
        restored_recall=_mean(recalls[2]),
        degraded_rise=_mean([now > then for now, then in zip(alarms[1], alarms[0], strict=True)]),
        restored_rise=_mean([now > then for now, then in zip(alarms[2], alarms[0], strict=True)]),
        images=len(known),
        defects=len(recalls[0]),
        defect_free_images=len(free),
    )


def _mean_ap(maps: Sequence[Map], masks: Sequence[Mask]) -> float:
    values = [average_precision([scores], [mask]) for scores, mask in zip(maps, masks, strict=True) if mask.any()]
    return float(np.mean(values)) if values else math.nan


def _recovered(clean: float, degraded: float, restored: float) -> float:
    return (restored - degraded) / (clean - degraded) if clean > degraded else math.nan


def _given(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[bool]) -> float | None:
    return float(np.mean(values)) if values else None


def _threshold(maps: Sequence[Map], masks: Sequence[Mask], share: float) -> float:
    """The smallest score that at most `share` of the background's pixels exceed."""
    background = [~_grown(mask) for mask in masks]
    wanted = int(share * sum(int(b.sum()) for b in background)) + 1
    top = np.zeros(0, np.float32)
    for scores, outside in zip(maps, background, strict=True):
        top = np.concatenate([top, scores[outside]])
        if len(top) > wanted:
            top = np.partition(top, -wanted)[-wanted:]
    return float(top.min()) if len(top) else 1.0


def _grown(mask: Mask) -> Mask:
    if not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask)) <= _NEAR


def _hits(maps: Sequence[Map], masks: Sequence[Mask], threshold: float, min_area: int) -> list[bool]:
    """For each defect of all images, whether it was found."""
    hits: list[bool] = []
    for scores, mask in zip(maps, masks, strict=True):
        labels, count = _label(mask)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        found = np.bincount(labels[scores > threshold], minlength=count + 1)[1:]
        hits += (found >= np.minimum(sizes, min_area)).tolist()
    return hits


def _regions(alarm: Mask, min_area: int) -> int:
    labels, _ = _label(alarm)
    return int((np.bincount(labels.ravel())[1:] >= min_area).sum())


def _label(mask: Mask) -> tuple[NDArray[np.int32], int]:
    labels, count = ndimage.label(mask, _EIGHT)  # type: ignore[misc]
    return np.asarray(labels, np.int32), int(count)


def _recovered_bounds(
    kept: Sequence[Sequence[Map]], masks: Sequence[Mask], groups: Sequence[str], draws: int = 400
) -> Bounds | None:
    """Whole groups drawn with replacement; scores are binned, since the interval needs no more than that."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    weights = np.random.default_rng(0).multinomial(index.max() + 1, np.ones(index.max() + 1) / (index.max() + 1), draws)
    values: list[NDArray[np.float64]] = []
    for maps in kept:
        pool = np.concatenate([s[m] for s, m in zip(maps, masks, strict=True)] or [np.zeros(0, np.float32)])
        if not len(pool):
            return None
        edges = np.unique(np.quantile(pool, np.linspace(0, 1, 1025)))
        values.append(_binned_ap(maps, masks, edges, weights[:, index]))
    clean, degraded, restored = values
    usable = clean > degraded
    if not usable.any():
        return None
    share = (restored[usable] - degraded[usable]) / (clean[usable] - degraded[usable])
    low, high = np.percentile(share, [2.5, 97.5])
    return Bounds(low=float(low), high=float(high))


def _binned_ap(
    maps: Sequence[Map], masks: Sequence[Mask], edges: NDArray[np.float32], weights: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Average precision for each row of image weights; NaN, which compares as False, where a draw has no defect."""
    counts = np.zeros((2, len(maps), len(edges) + 1))
    for i, (scores, mask) in enumerate(zip(maps, masks, strict=True)):
        reached = np.searchsorted(edges, scores, side="right")
        for kind, chosen in enumerate((mask, ~mask)):
            counts[kind, i] = np.bincount(reached[chosen], minlength=len(edges) + 1)
    true, false = (np.cumsum((weights @ part)[:, 1:][:, ::-1], axis=1) for part in counts)
    gained = np.diff(true, axis=1, prepend=0)
    precision = np.divide(true, true + false, out=np.zeros_like(true), where=true + false > 0)
    total = true[:, -1]
    return np.divide((gained * precision).sum(1), total, out=np.full(len(total), np.nan), where=total > 0)
