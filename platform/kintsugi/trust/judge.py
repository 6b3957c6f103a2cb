"""What can be said of a restoration without the clean original, and whether to restore at all.

A restoration is held against its own input: what it does not explain of it should look like noise (see
`kintsugi.remainder`). Whether an image is restored at all is told before, from statistics of the input.

Images are float32 in [0, 1], (H, W) or (H, W, C); of a colour image the worst channel speaks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import ndimage

from kintsugi.errors import DataError, ImageError
from kintsugi.trust.remainder import MAD, blur, compare, deviation, median, white_noise

Unit = NDArray[np.float32]
Mask = NDArray[np.bool_]
Vector = NDArray[np.float64]

_TEXTURE = 10
"""Leading input statistics that do not depend on exposure."""
_SLACK = 1.4
"""An image is unfamiliar this much beyond what training inputs reach: new parts scatter more than known ones."""
_LEAST_SIDE = 16
"""Images below this many px a side have no statistics."""


class TrustLimits(BaseModel):
    """Where the alarm is raised; the fields are `Trust`'s. Travels with a model, since restorers differ.

    The default score lies between those that 95% of perfect restorations of magnetic tiles (5) and of non-local means
    of them (9) stay under; `calibrate` finds the model's own.
    """

    model_config = ConfigDict(frozen=True)
    max_alarm_score: float = 7.0
    min_retention: float = 0.0
    min_local_retention: float = 0.0
    max_expected_error: float | None = None


@dataclass(frozen=True)
class Trust:
    """What a restoration did to the structure of its input.

    Attributes:
        retention: share of the input's structure above its noise that the output keeps, 0 to 1.
        local_retention: the smallest such share in any window that holds structure.
        added: share of pixels where the output holds structure that the input does not support.
        removed: share of pixels where the output lacks structure of the input.
        alarm_score: the largest local mean of the remainder, in standard deviations of its noise.
        expected_error: the largest local mean of the model's own bound of its error, 0 where it gives none.
        reasons: what raised the alarm, in words.
        suspicion: (H, W), at each pixel the largest local mean over scales, in standard deviations.
    """

    retention: float
    local_retention: float
    added: float
    removed: float
    alarm_score: float
    expected_error: float
    alarm: bool
    reasons: tuple[str, ...]
    suspicion: Unit = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, float | bool | tuple[str, ...]]:
        """All but the map."""
        return {name: value for name, value in vars(self).items() if name != "suspicion"}


def judge(
    degraded: Unit, restored: Unit, *, error_bound: Unit | None = None, limits: TrustLimits | None = None
) -> Trust:
    """Hold a restoration against its input.

    Args:
        error_bound: (H, W), the model's prediction of its absolute error, of full scale. It can raise an alarm and
            silences none: a model that is unsure of a defect has no leave to erase it.

    Raises:
        ImageError: the images differ in size.
        DataError: one of them holds values that are not finite.
    """
    limits = limits or TrustLimits()
    _check(degraded, restored)
    planes = [compare(before, after) for before, after in zip(_planes(degraded), _planes(restored), strict=True)]
    suspicion = np.maximum.reduce([plane.suspicion for plane in planes])
    grew = np.logical_or.reduce([plane.grew for plane in planes])
    over = suspicion > limits.max_alarm_score
    trust = Trust(
        retention=min(plane.retention for plane in planes),
        local_retention=min(plane.local_retention for plane in planes),
        added=float((over & grew).mean()),
        removed=float((over & ~grew).mean()),
        alarm_score=float(suspicion.max()),
        expected_error=0.0 if error_bound is None else float(blur(error_bound, 8.0).max()),
        alarm=False,
        reasons=(),
        suspicion=suspicion,
    )
    reasons = (*_places(suspicion, grew, over), *_shortfalls(trust, limits))
    return replace(trust, alarm=bool(reasons), reasons=reasons)


def _places(suspicion: Unit, grew: Mask, over: Mask, most: int = 3) -> Iterator[str]:
    """The most suspicious regions in words, worst first."""
    labels, count = cast(tuple[NDArray[np.int32], int], ndimage.label(over, np.ones((3, 3))))
    peaks = ndimage.maximum_position(suspicion, labels, np.arange(1, count + 1)) if count else []
    for row, column in sorted(peaks, key=lambda at: -suspicion[at])[:most]:
        yield f"structure {'added' if grew[row, column] else 'removed'} near row {row}, column {column}"


def _shortfalls(trust: Trust, limits: TrustLimits) -> Iterator[str]:
    if trust.retention < limits.min_retention:
        yield f"only {trust.retention:.0%} of the input's structure is kept"
    if trust.local_retention < limits.min_local_retention:
        yield f"in one place only {trust.local_retention:.0%} of the input's structure is kept"
    if limits.max_expected_error is not None and trust.expected_error > limits.max_expected_error:
        yield f"the model itself expects to be {trust.expected_error:.0%} of full scale off in one place"


def calibrate(
    scores: Sequence[Trust], groups: Sequence[str] | None = None, *, target_false_alarm: float = 0.05
) -> TrustLimits:
    """Limits that restorations known to be good pass, but for a share of `target_false_alarm`.

    Split conformal: the limit is the k-th smallest of n scores with k = ceil((n + 1)(1 - target)), so that the share
    holds for new images of the same kind (Vovk et al. 2005; Angelopoulos and Bates 2022). With `groups` every
    group weighs the same, so that one part photographed often does not set the limit.

    Raises:
        DataError: there are no scores.
    """
    if not scores:
        raise DataError("limits are calibrated on restorations: give at least one")
    values = np.array([score.alarm_score for score in scores])
    return TrustLimits(max_alarm_score=_conformal_quantile(values, groups, 1 - target_false_alarm))


def _conformal_quantile(values: Vector, groups: Sequence[str] | None, level: float) -> float:
    _, index = np.unique(np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True)
    weight = 1 / np.bincount(index)[index]
    order = np.argsort(values)
    share = min(level * (len(values) + 1) / len(values), 1.0)
    reached = np.searchsorted(np.cumsum(weight[order]), share * weight.sum() - 1e-9)
    return float(values[order][min(int(reached), len(values) - 1)])


def conformal_scale(
    bounds: Sequence[Unit], errors: Sequence[Unit], groups: Sequence[str] | None = None, *, coverage: float = 0.9
) -> float:
    """The smallest factor of predicted error bounds by which they hold for `coverage` of the pixels of new images.

    The expected share of pixels outside is held down as by conformal risk control (Angelopoulos et al., ICLR 2024,
    after their image-to-image bounds of ICML 2022). With `groups` every group weighs the same. With fewer groups
    than 1 / (1 - coverage) nothing can be promised: the factor then covers every pixel seen.

    Args:
        bounds: predicted bounds of the absolute error, one array an image.
        errors: absolute errors of the same shapes.

    Raises:
        DataError: there are no images.
    """
    if not bounds:
        raise DataError("bounds are calibrated on images: give at least one")
    ratios = [np.sort(np.ravel(e) / np.maximum(np.ravel(b), 1e-6)) for b, e in zip(bounds, errors, strict=True)]
    _, index = np.unique(np.arange(len(ratios)) if groups is None else np.asarray(groups), return_inverse=True)
    weight = 1 / np.bincount(index)[index]
    count = float(weight.sum())
    allowed = ((1 - coverage) * (count + 1) - 1) / count
    low, high = 0.0, max(float(ratio[-1]) for ratio in ratios)
    while high - low > 1e-4 * high and allowed > 0:
        middle = (low + high) / 2
        outside = [1 - float(np.searchsorted(ratio, middle, "right")) / len(ratio) for ratio in ratios]
        low, high = (low, middle) if np.average(outside, weights=weight) <= allowed else (middle, high)
    return high


def confidence_map(degraded: Unit, restored: Unit) -> Unit:
    """(H, W) bound of the absolute error, of full scale, where a model predicts none: scale it by `conformal_scale`.

    The local deviation (Gaussian of 4 px) of what the restoration changed: noise taken out and structure lost alike.

    Raises:
        ImageError: the images differ in size.
        DataError: one of them holds values that are not finite.
    """
    _check(degraded, restored)
    planes = zip(_planes(degraded), _planes(restored), strict=True)
    return np.maximum.reduce([deviation(before, after) for before, after in planes])


def _check(degraded: Unit, restored: Unit) -> None:
    if degraded.shape != restored.shape:
        raise ImageError("mismatch", f"the input is {degraded.shape}, its restoration {restored.shape}: give one size")
    for name, image in (("input", degraded), ("restoration", restored)):
        if not np.isfinite(image).all():
            raise DataError(f"the {name} holds values that are not finite: nothing can be said of it")


def _planes(image: Unit) -> list[Unit]:
    planes = [image] if image.ndim == 2 else [image[..., channel] for channel in range(image.shape[2])]
    return [np.ascontiguousarray(plane, np.float32) for plane in planes]


class InputProfile(BaseModel):
    """What the inputs of a model looked like in training, by `input_statistics`; made by `fit_profile`.

    Two clouds, degraded and clean images, each a mean, an inverse covariance and the largest Mahalanobis distance
    of a member. The clean one knows texture only, so that exposure does not matter to it.
    """

    model_config = ConfigDict(frozen=True)
    degraded: "Cloud"
    clean: "Cloud | None" = None


class Cloud(BaseModel):
    model_config = ConfigDict(frozen=True)
    mean: tuple[float, ...]
    precision: tuple[tuple[float, ...], ...]
    limit: float

    def distance(self, statistics: Vector) -> float:
        away = statistics[: len(self.mean)] - np.array(self.mean)
        return math.sqrt(max(float(away @ np.array(self.precision) @ away), 0.0))


def fit_profile(
    degraded: Sequence[Unit],
    clean: Sequence[Unit] = (),
    *,
    target_unfamiliar: float = 0.01,
    target_clean_missed: float = 0.02,
) -> InputProfile:
    """Describe training inputs, and clean images where there are some (50 or more of each make it reliable).

    The clean cloud ends where degraded images begin: where the two mix, an image passes for degraded. So leave out
    of `degraded` what was not degraded at all.

    Raises:
        DataError: fewer than two images of at least 16 px a side.
    """
    seen = [input_statistics(image) for image in degraded if min(image.shape[:2]) >= _LEAST_SIDE]
    originals = [input_statistics(image)[:_TEXTURE] for image in clean if min(image.shape[:2]) >= _LEAST_SIDE]
    around = _cloud(seen, 1 - target_unfamiliar)
    around = around.model_copy(update={"limit": _SLACK * around.limit})
    if not originals:
        return InputProfile(degraded=around)
    pure = _cloud(originals, 1 - target_clean_missed)
    nearest = float(np.quantile([pure.distance(vector) for vector in seen], 0.005))
    return InputProfile(degraded=around, clean=pure.model_copy(update={"limit": min(pure.limit, 0.9 * nearest)}))


def _cloud(members: Sequence[Vector], share: float, folds: int = 20) -> Cloud:
    """A cloud whose limit lets `share` of new members in: distances are taken from clouds fitted without them."""
    if len(members) < 2:
        raise DataError(f"a profile needs two images of at least {_LEAST_SIDE} px a side (got {len(members)})")
    vectors = np.stack(members)
    fold = np.arange(len(vectors)) % min(folds, len(vectors))
    without = [_fitted(vectors[fold != left]) for left in range(fold.max() + 1)]
    distances = np.array([without[left].distance(vector) for left, vector in zip(fold, vectors, strict=True)])
    return _fitted(vectors).model_copy(update={"limit": _conformal_quantile(distances, None, share)})


def _fitted(vectors: Vector) -> Cloud:
    spread = np.cov(vectors, rowvar=False) if len(vectors) > 1 else np.zeros((vectors.shape[1],) * 2)
    # Shrunk towards its diagonal, so that few images do not make directions that hold nothing.
    precision = np.linalg.inv(0.95 * spread + np.diag(0.05 * np.diag(spread) + 1e-6))
    return Cloud(mean=tuple(vectors.mean(0)), precision=tuple(map(tuple, precision)), limit=0)


def abstain_reason(image: Unit, profile: InputProfile) -> str | None:
    """Why an image is better left alone: "already clean", "unfamiliar", or None; decided from the input alone.

    Of an image under 16 px a side nothing can be said: None.

    Raises:
        DataError: the image holds values that are not finite.
    """
    _check(image, image)
    if min(image.shape[:2]) < _LEAST_SIDE:
        return None
    statistics = input_statistics(image)
    if profile.clean is not None and profile.clean.distance(statistics) <= profile.clean.limit:
        return "already clean"
    return "unfamiliar" if profile.degraded.distance(statistics) > profile.degraded.limit else None


def input_statistics(image: Unit) -> Vector:
    """Texture, then brightness and the shares clipped at either end.

    Of texture: logarithms of its strength at five finenesses, that of an 8 px grid as JPEG leaves it, and how far
    the fine one is correlated at 1 and 2 px down and across.
    """
    grey = np.ascontiguousarray(image if image.ndim == 2 else image.mean(axis=2, dtype=np.float32))
    pyramid = [grey, *(blur(grey, sigma) for sigma in (0.7, 1.4, 2.8, 5.6))]
    strengths = [white_noise(grey), *(median(np.abs(a - b)) / MAD for a, b in pairwise(pyramid))]
    fine = grey - pyramid[2]
    power = float(np.square(fine).mean()) + 1e-9
    lagged = [(fine[n:] * fine[:-n]).mean() / power for n in (1, 2)]
    lagged += [(fine[:, n:] * fine[:, :-n]).mean() / power for n in (1, 2)]
    grid = max(_grid(grey), _grid(grey.T))
    ends = np.array([(grey <= 1.5 / 255).mean(), (grey >= 253.5 / 255).mean()])
    return np.array([*np.log(np.array(strengths) + 3e-4), grid, *lagged, grey.mean(), *np.log(ends + 0.02)], np.float64)


def _grid(image: Unit) -> float:
    """How much stronger rows differ at one of 8 phases than at the median phase, as a logarithm."""
    steps = np.abs(np.diff(image, axis=0)).mean(1)
    phases = steps[: len(steps) // 8 * 8].reshape(-1, 8).mean(0)
    return math.log((float(phases.max()) + 1e-4) / (float(np.median(phases)) + 1e-4))
