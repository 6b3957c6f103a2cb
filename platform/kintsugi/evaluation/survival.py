"""At which size and contrast planted defects vanish.

Known spots are set into a defect-free image far from each other, the image is degraded and restored, and what is
left of each spot's contrast is compared with what was planted. The same image without spots passes with the same
noise, and its contrast at each place is subtracted, so that texture and noise cancel to first order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import ndimage

from kintsugi.data.degradation import Degradation, generator_for
from kintsugi.data.planted import plant_spot
from kintsugi.imaging import Image, convert

Unit = NDArray[np.float32]
Restore = Callable[[Image], Image]

SIZES = (1.0, 2.0, 3.0, 5.0, 8.0)
CONTRASTS = (-0.32, -0.16, -0.08, -0.04, 0.04, 0.08, 0.16, 0.32)
_REACH = 13
"""Half of the window in px that one spot and its ring of up to 7 px need."""
_SPACING, _JITTER = 36, 6
_COARSE, _SHADING = 8.0, 0.004
SURVIVES = 0.5
"""A spot survives if at least this share of its contrast is kept."""


class Cell(BaseModel):
    """All spots of one diameter (px) and contrast (of full scale).

    `kept` is the mean share of the planted contrast that is left, 1 when nothing is lost, and `kept_low` and
    `kept_high` its 95% interval; `survived` the share of spots that keep at least half; the `degraded_` ones are the
    same before restoring. Blur alone takes contrast from small spots, so compare both.
    """

    model_config = ConfigDict(frozen=True)
    diameter: float
    contrast: float
    kept: float
    kept_low: float
    kept_high: float
    survived: float
    degraded_kept: float
    degraded_survived: float
    count: int


class SurvivalCurve(BaseModel):
    """What is kept of planted defects, by size and contrast."""

    model_config = ConfigDict(frozen=True)
    cells: tuple[Cell, ...]
    images: int

    def cell(self, diameter: float, contrast: float) -> Cell:
        return next(c for c in self.cells if c.diameter == diameter and c.contrast == contrast)


def measure_survival(
    images: Iterable[tuple[str, Image]],
    degradation: Degradation,
    restore: Restore,
    *,
    sizes: Sequence[float] = SIZES,
    contrasts: Sequence[float] = CONTRASTS,
    seed: int = 0,
) -> SurvivalCurve:
    """Plant, degrade, restore, compare.

    Each image gets at most one spot of each size and contrast, as many as find room, and passes `restore` twice.
    A change of exposure between output and clean image is divided out; spots that would saturate are left out.

    Args:
        images: names and clean, defect-free images. The name seeds what is random, places and noise alike.
    """
    found: dict[tuple[float, float], list[tuple[float, float]]] = {(d, c): [] for d in sizes for c in contrasts}
    count = 0
    for name, image in images:
        count += 1
        for kind, kept in _kept(name, image, degradation, restore, list(found), seed):
            found[kind].append(kept)
    cells = (_cell(kind, np.array(kept)) for kind, kept in found.items() if kept)
    return SurvivalCurve(cells=tuple(cells), images=count)


def draw_survival(curves: Mapping[str, SurvivalCurve], title: str = "") -> bytes:
    """A PNG: for each contrast what is kept over the diameter, dark spots above, bright ones below.

    One line for each named curve; the degraded input of the first one is dotted.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    contrasts = sorted({cell.contrast for curve in curves.values() for cell in curve.cells})
    rows = [row for row in ([c for c in contrasts if c < 0][::-1], [c for c in contrasts if c > 0]) if row]
    across = max((len(row) for row in rows), default=1)
    figure = Figure(figsize=(2.3 * across + 0.6, 2.1 * max(len(rows), 1) + 0.8), dpi=110, layout="constrained")
    grid: NDArray[Any] = figure.subplots(max(len(rows), 1), across, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat:
        axes.set_visible(False)
    for axes_row, row in zip(grid, rows, strict=False):
        for axes, contrast in zip(axes_row, row, strict=False):
            _draw_contrast(axes, curves, contrast)
    for axes in grid[-1]:
        axes.set_xlabel("diameter, px", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("contrast kept", fontsize=8)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(len(labels), 1), fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    buffer = BytesIO()
    # No software version in the file: the same picture is the same bytes.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_contrast(axes: Any, curves: Mapping[str, SurvivalCurve], contrast: float) -> None:
    axes.set_visible(True)
    axes.axhline(1, color="0.8", linewidth=0.8)
    axes.axhline(SURVIVES, color="0.8", linewidth=0.8, linestyle="--")
    for place, (name, curve) in enumerate(curves.items()):
        cells = sorted((c for c in curve.cells if c.contrast == contrast), key=lambda c: c.diameter)
        diameters = [c.diameter for c in cells]
        if place == 0:
            before = [c.degraded_kept for c in cells]
            axes.plot(diameters, before, color="0.35", linestyle=":", linewidth=1.4, label="degraded")
        (line,) = axes.plot(diameters, [c.kept for c in cells], marker="o", markersize=3, linewidth=1.4, label=name)
        low, high = [c.kept_low for c in cells], [c.kept_high for c in cells]
        axes.fill_between(diameters, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_title(f"{contrast:+.0%} of full scale", fontsize=8)
    axes.set_ylim(-0.25, 1.4)
    axes.tick_params(labelsize=7)


def _kept(
    name: str, image: Image, degradation: Degradation, restore: Restore, kinds: list[tuple[float, float]], seed: int
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """For each spot that found room its kind, and what restored and degraded image keep of it."""
    lossless = convert(image, "png") if image.format == "jpeg" else image
    clean = lossless.to_unit()
    spots = _spots(image.size, kinds, generator_for(seed, "survival", name))
    planted = clean.copy()
    for spot in spots:
        spot.plant(planted)
    states = [np.clip(planted, 0, 1), clean]
    noise = [generator_for(seed, "survival noise", name) for _ in states]
    seen = [
        lossless.with_unit(degradation(state, same, image.white_level))
        for state, same in zip(states, noise, strict=True)
    ]
    pairs = [[_grey(state.to_unit()) for state in pair] for pair in ([restore(s) for s in seen], seen)]
    gains = [_exposure(without, _grey(clean)) for _, without in pairs]
    kept: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for spot in spots:
        meant, real = (spot.contrast_of(_grey(p)) - spot.contrast_of(_grey(clean)) for p in (planted, states[0]))
        if abs(real) >= 0.9 * abs(meant):
            left = [spot.contrast_of(a) - spot.contrast_of(b) for a, b in pairs]
            kept.append((spot.kind, (left[0] / gains[0] / real, left[1] / gains[1] / real)))
    return kept


class _Spot:
    """One planted disc: where it is, how much it adds, and where its contrast is measured."""

    def __init__(self, kind: tuple[float, float], place: tuple[int, int], generator: np.random.Generator) -> None:
        self.kind = kind
        diameter, self.contrast = kind
        rows, columns = (slice(start - _REACH, start + _REACH + 2) for start in place)
        self.window = rows, columns
        # Spots keep 8 px from the border, so in 18 px only the middle pixel is left, and a fraction of it is drawn.
        flat = np.full((18, 18), 0.5, np.float32)
        drawn, mask = plant_spot(flat, generator, diameter=diameter, contrast=0.25)
        edge = _REACH - 8
        self.cover = np.pad((drawn - flat) * 4, edge)
        self.middle = np.pad(mask, edge)
        away = np.asarray(ndimage.distance_transform_edt(~self.middle))
        self.ring = (away > 3) & (away <= 7)

    def plant(self, image: Unit) -> None:
        added = np.float32(self.contrast) * self.cover
        image[self.window] += added if image.ndim == 2 else added[..., None]

    def contrast_of(self, image: Unit) -> float:
        """Mean of the spot less the mean of the ring from 3 to 7 px around it."""
        patch = image[self.window]
        return float(patch[self.middle].mean() - patch[self.ring].mean())


def _spots(size: tuple[int, int], kinds: list[tuple[float, float]], generator: np.random.Generator) -> list[_Spot]:
    """Spots on a jittered grid; where not all find room, chance decides which do."""
    rows, columns = (range(_REACH, side - _REACH - 1, _SPACING) for side in size)
    if not rows or not columns:
        return []
    places = [(r, c) for r in rows for c in columns]
    jitter = [min(_JITTER, side - _REACH - 2 - axis[-1]) for side, axis in zip(size, (rows, columns), strict=True)]
    chosen = generator.permutation(len(places))[: len(kinds)]
    order = generator.permutation(len(kinds))
    return [
        _Spot(kinds[kind], _moved(places[at], jitter, generator), generator)
        for at, kind in zip(chosen, order, strict=False)
    ]


def _moved(place: tuple[int, int], jitter: list[int], generator: np.random.Generator) -> tuple[int, int]:
    down, right = (int(generator.integers(0, by, endpoint=True)) for by in jitter)
    return place[0] + down, place[1] + right


def _exposure(output: Unit, clean: Unit) -> float:
    """The gain from `clean` to `output`, from shading coarser than noise and blur; 1 where there is none.

    A fit to all pixels would take noise in the output, or its absence, for a change of exposure.
    """
    seen, true = (ndimage.gaussian_filter(image.astype(np.float64), _COARSE) for image in (output, clean))
    variance = true.var()
    if variance < _SHADING**2:
        return 1.0
    return float(np.clip(((seen - seen.mean()) * (true - true.mean())).mean() / variance, 0.1, 10))


def _grey(image: Unit) -> Unit:
    return image if image.ndim == 2 else image.mean(axis=2, dtype=np.float32)


def _cell(kind: tuple[float, float], kept: NDArray[np.float64]) -> Cell:
    restored, degraded = kept.T
    draws = np.random.default_rng(0).integers(0, len(restored), (400, len(restored)))
    low, high = np.percentile(restored[draws].mean(1), [2.5, 97.5])
    return Cell(
        diameter=kind[0], contrast=kind[1], kept=float(restored.mean()), kept_low=float(low), kept_high=float(high),
        survived=float((restored >= SURVIVES).mean()), degraded_kept=float(degraded.mean()),
        degraded_survived=float((degraded >= SURVIVES).mean()), count=len(kept),
    )  # fmt: skip
