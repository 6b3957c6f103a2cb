"""Pictures for people: numpy in, PNG out. Uses no display and no global figure state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]
OUTLINE = (1.0, 0.25, 0.1)
_TILE_INCHES = 1.6


def picture_grid(
    rows: Sequence[Sequence[Pixels]],
    column_titles: Sequence[str],
    row_titles: Sequence[str],
    path: Path,
    *,
    captions: Sequence[Sequence[str]] = (),
) -> Path:
    """Write images in rows and columns to a PNG.

    Args:
        rows: (H, W) or (H, W, 3) images, floats in [0, 1] or integers of their type's full scale. A row may
            be shorter than the others.
        row_titles, captions: may be left empty; captions stand below their image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = max(len(row) for row in rows)
    tall = _TILE_INCHES * _aspect(rows) + (0.22 if captions else 0.06)
    figure = Figure(figsize=(_TILE_INCHES * across + 0.4, tall * len(rows) + 0.4), dpi=120, layout="constrained")
    grid: NDArray[Any] = figure.subplots(len(rows), across, squeeze=False)
    for r, axes in enumerate(grid):
        for c, ax in enumerate(axes):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if r == 0 and c < len(column_titles):
                ax.set_title(column_titles[c], fontsize=9, fontweight="bold")
            if c < len(rows[r]):
                ax.imshow(as_rgb(rows[r][c]), interpolation="antialiased")
            if captions and c < len(captions[r]):
                ax.set_xlabel(captions[r][c], fontsize=6.5, labelpad=2)
        if r < len(row_titles):
            axes[0].set_ylabel(row_titles[r], fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No software version in the file: the same picture is the same bytes.
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return path


def overlay(image: Pixels, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(H, W, 3) float32: the image with a coloured line around each masked region.

    The line runs outside the mask, one pixel away, so that the defect itself stays visible.
    """
    rgb = as_rgb(image).copy()
    width = max(1, round(max(mask.shape) / 150))
    near = _grown(mask, 1)
    rgb[_grown(mask, 1 + width) & ~near] = OUTLINE
    return rgb


def as_rgb(image: Pixels) -> NDArray[np.float32]:
    """(H, W, 3) float32 in [0, 1]."""
    scale = float(np.iinfo(image.dtype).max) if np.issubdtype(image.dtype, np.integer) else 1.0
    unit = np.clip(image.astype(np.float32) / np.float32(scale), 0, 1)
    return np.repeat(unit[..., None], 3, axis=2) if unit.ndim == 2 else unit


def mosaic(rows: Sequence[Sequence[Pixels]], gap: int = 4) -> NDArray[np.uint8]:
    """(H, W, 3): images in rows and columns, pixel for pixel, on white."""
    high = [max(image.shape[0] for image in row) for row in rows]
    wide = [max(row[c].shape[1] for row in rows if c < len(row)) for c in range(max(len(row) for row in rows))]
    sheet = np.full((sum(high) + gap * (len(high) - 1), sum(wide) + gap * (len(wide) - 1), 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = sum(high[:r]) + gap * r, sum(wide[:c]) + gap * c
            sheet[top : top + image.shape[0], left : left + image.shape[1]] = np.rint(255 * as_rgb(image))
    return sheet


def _grown(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * by + 1, 2 * by + 1))
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(np.bool_)


def _aspect(rows: Sequence[Sequence[Pixels]]) -> float:
    """Height over width of a typical image, within what a page bears."""
    ratios = [image.shape[0] / image.shape[1] for row in rows for image in row]
    return float(np.clip(np.median(ratios), 0.4, 1.6))
