"""Small known defects set into an image on purpose: for training, and to find where defects vanish."""

import cv2
import numpy as np
from numpy.typing import NDArray

from kintsugi.data.degradation import Unit

Mask = NDArray[np.bool_]

_FINE = 4
"""Defects are drawn on a grid this much finer than the pixels."""


def plant_spot(image: Unit, generator: np.random.Generator, *, diameter: float, contrast: float) -> tuple[Unit, Mask]:
    """A disc with anti-aliased rim at a random place.

    Args:
        image: (H, W) or (H, W, C) in [0, 1].
        diameter: px.
        contrast: added at the disc's middle, of full scale; negative for a dark spot.

    Returns:
        The image, clipped to [0, 1], and a mask of the pixels that are covered at least by half (at least one).
    """
    centre = _place(image, generator)
    return _blend(image, _drawn(image, [centre, centre], diameter), contrast)


def plant_line(
    image: Unit, generator: np.random.Generator, *, width: float, length: float, contrast: float
) -> tuple[Unit, Mask]:
    """A slightly bent line, as a scratch or a crack is, at a random place; sizes in px, see `plant_spot`."""
    point, angle = _place(image, generator), generator.uniform(0, 2 * np.pi)
    points = [point]
    steps = max(2, int(length / 4))
    for _ in range(steps):
        angle += generator.normal(0, 0.2)
        point = point + length / steps * np.array([np.cos(angle), np.sin(angle)])
        points.append(point)
    return _blend(image, _drawn(image, points, width), contrast)


def plant_random(image: Unit, generator: np.random.Generator, sizes: tuple[float, float] = (1, 5)) -> tuple[Unit, Mask]:
    """A spot or a line of either sign, `sizes` px wide and of a contrast between 4% and 40%."""
    size = generator.uniform(*sizes)
    contrast = generator.choice((-1, 1)) * np.exp(generator.uniform(np.log(0.04), np.log(0.4)))
    if generator.random() < 0.5:
        return plant_spot(image, generator, diameter=size, contrast=contrast)
    return plant_line(image, generator, width=size / 2, length=generator.uniform(8, 48), contrast=contrast)


def _place(image: Unit, generator: np.random.Generator) -> NDArray[np.float64]:
    """(x, y) of a pixel, away from the border where the image is large enough."""
    height, width = image.shape[:2]
    margin = min(8, (min(height, width) - 1) // 2)
    return np.array([generator.uniform(margin, width - 1 - margin), generator.uniform(margin, height - 1 - margin)])


def _drawn(image: Unit, points: list[NDArray[np.float64]], width: float) -> NDArray[np.float32]:
    """How much of each pixel the stroke covers, (H, W) in [0, 1]."""
    height, columns = image.shape[:2]
    scaled = np.rint((np.array(points) + 0.5) * _FINE - 0.5).astype(np.int32)
    pad = int(width) + 2
    low = np.maximum(scaled.min(0) // _FINE - pad, 0)
    high = np.minimum(scaled.max(0) // _FINE + pad + 1, (columns, height))
    cover = np.zeros((height, columns), np.float32)
    if (high <= low).any():
        return cover
    fine = np.zeros(((high[1] - low[1]) * _FINE, (high[0] - low[0]) * _FINE), np.uint8)
    shifted = scaled - low * _FINE
    cv2.polylines(fine, [shifted[:, None]], False, 255, thickness=max(1, round(width * _FINE)))
    if len(points) == 2 and (points[0] == points[1]).all():
        fine[:] = 0
        cv2.circle(fine, tuple(int(v) for v in shifted[0]), max(1, round(width * _FINE / 2)), 255, -1)
    shape = (int(high[0] - low[0]), int(high[1] - low[1]))
    small = cv2.resize(fine, shape, interpolation=cv2.INTER_AREA)
    cover[low[1] : high[1], low[0] : high[0]] = small.astype(np.float32) / 255
    return cover


def _blend(image: Unit, cover: NDArray[np.float32], contrast: float) -> tuple[Unit, Mask]:
    added = np.float32(contrast) * (cover if image.ndim == 2 else cover[..., None])
    return np.clip(image + added, 0, 1).astype(np.float32), cover >= min(0.5, float(cover.max()))
