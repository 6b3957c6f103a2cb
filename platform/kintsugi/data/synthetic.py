"""Surfaces with planted defects of known mask, written in the `pairs` layout that the reader reads.

Materials: brick, gravel and grass are CC0 photographs that scikit-image ships, cut into disjoint patches so
that no piece of a photograph is in two parts; brushed metal and weave are drawn. Metal is written with 16 bits.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import skimage.data
from numpy.typing import NDArray
from scipy import ndimage

from kintsugi.data.degradation import generator_for
from kintsugi.imaging import Image, encode, encode_mask

Surface = NDArray[np.float32]
Mask = NDArray[np.bool_]
Draw = Callable[[Surface, np.random.Generator], tuple[Surface, Mask]]

PHOTOGRAPHS = ("brick", "gravel", "grass")
DRAWN = ("metal", "weave")
MATERIALS = (*PHOTOGRAPHS, *DRAWN)
VARIED = (*MATERIALS, "leaves", "cloud")
"""With surfaces of no particular material, for a model that shall meet unknown ones."""
COLUMNS: tuple[str, ...] = ("name", "part", "category", "defect_type", "split")


def write_synthetic(
    folder: Path, *, seed: int = 0, parts: int = 45, size: int = 168, materials: Sequence[str] = MATERIALS
) -> Path:
    """Draw `parts` parts with three images each: two with different defects, one without.

    Args:
        size: side of the square images in px.
        materials: taken in turn, of `VARIED`.

    Returns:
        `folder`, now with clean/, mask/ and manifest.csv; the same arguments give the same bytes.
    """
    for name in ("clean", "mask"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for number, (material, surface) in enumerate(_parts(seed, parts, size, materials)):
        kinds = sorted(DEFECTS)
        first = number % len(kinds)
        for kind in (kinds[first], kinds[(first + 1 + number // len(kinds) % 3) % len(kinds)], "good"):
            name = f"{material}-{number:03d}-{kind}"
            generator = generator_for(seed, name)
            image, mask = DEFECTS[kind](surface, generator) if kind in DEFECTS else (surface, _empty(surface))
            (folder / "clean" / f"{name}.png").write_bytes(encode(_quantised(image, material)))
            (folder / "mask" / f"{name}.png").write_bytes(encode_mask(mask))
            part = f"{material}-{number:03d}"
            rows.append(dict(zip(COLUMNS, (name, part, material, kind, _split(number)), strict=True)))
    with (folder / "manifest.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def _split(number: int) -> str:
    # 9 shares no factor with the 5 materials and the 4 defects: from 45 parts on, each split holds them all.
    return {7: "val", 8: "test"}.get(number % 9, "train")


def _parts(seed: int, parts: int, size: int, materials: Sequence[str]) -> Iterator[tuple[str, Surface]]:
    """Materials in turn; a photograph that has no patch left is followed by drawn surfaces."""
    patches = {name: _patches(name, size) for name in PHOTOGRAPHS}
    drawable = [material for material in materials if material in _DRAWERS] or list(DRAWN)
    for number in range(parts):
        material = materials[number % len(materials)]
        patch = next(patches[material], None) if material in patches else None
        if patch is not None:
            yield material, patch
            continue
        drawn = material if material in _DRAWERS else drawable[number % len(drawable)]
        yield drawn, _DRAWERS[drawn](size, generator_for(seed, drawn, number))


def _patches(name: str, size: int) -> Iterator[Surface]:
    photograph = getattr(skimage.data, name)().astype(np.float32) / 255
    for top in range(0, photograph.shape[0] - size + 1, size):
        for left in range(0, photograph.shape[1] - size + 1, size):
            yield photograph[top : top + size, left : left + size]


def _brushed_metal(size: int, generator: np.random.Generator) -> Surface:
    """Fine horizontal streaks under a soft fall of light."""
    streaks = ndimage.gaussian_filter(_noise(size, generator), (0.7, 18))
    light = ndimage.gaussian_filter(_noise(size, generator), size / 4)
    return _clipped(
        0.55 + 0.06 * _unit(np.asarray(streaks)) + 0.05 * _unit(np.asarray(light)) + 0.01 * _noise(size, generator)
    )


def _weave(size: int, generator: np.random.Generator) -> Surface:
    """Threads over and under each other with a slightly uneven pitch."""
    pitch = generator.uniform(9, 13)
    y, x = np.mgrid[:size, :size] + ndimage.gaussian_filter(generator.standard_normal((2, size, size)), (0, 9, 9)) * 12
    warp, weft = np.abs(np.sin(np.pi * x / pitch)), np.abs(np.sin(np.pi * y / pitch))
    over = (np.floor(x / pitch) + np.floor(y / pitch)) % 2 == 0
    return _clipped(0.3 + 0.35 * np.where(over, warp, weft) + 0.02 * _noise(size, generator))


def _dead_leaves(size: int, generator: np.random.Generator) -> Surface:
    """Discs of all sizes that hide each other: edges and flats as in photographs (Lee et al., IJCV 2001)."""
    image = np.full((size, size), 0.5, np.float32)
    contrast = generator.uniform(0.05, 0.3)
    for _ in range(1500):
        # Radii with density r**-3 between 1.5 px and a quarter of the side.
        radius = 1.5 / np.sqrt(1 - generator.random() * (1 - (6 / size) ** 2))
        y, x = generator.integers(0, size, 2)
        cv2.circle(image, (int(x), int(y)), round(radius), float(generator.normal(0.5, contrast)), -1, cv2.LINE_AA)
    grain = generator.uniform(0, 0.03) * ndimage.gaussian_filter(_noise(size, generator), generator.uniform(0.3, 1.2))
    return _clipped(image + grain)


def _cloud(size: int, generator: np.random.Generator) -> Surface:
    """Noise whose spectrum falls by a power between 1 and 2, stretched along one axis."""
    power, stretch = generator.uniform(1, 2), generator.uniform(1, 4)
    y, x = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size) * stretch, indexing="ij")
    spectrum = np.fft.rfft2(_noise(size, generator)) / np.maximum(np.hypot(y, x), 1 / size) ** power
    return _clipped(generator.uniform(0.3, 0.7) + generator.uniform(0.04, 0.15) * _unit(np.fft.irfft2(spectrum)))


_DRAWERS: dict[str, Callable[[int, np.random.Generator], Surface]] = {
    "metal": _brushed_metal,
    "weave": _weave,
    "leaves": _dead_leaves,
    "cloud": _cloud,
}


def _scratch(surface: Surface, generator: np.random.Generator) -> tuple[Surface, Mask]:
    """A bright, slightly bent line of 1 to 2 px."""
    size = surface.shape[0]
    length, angle = generator.uniform(0.25, 0.6) * size, generator.uniform(0, np.pi)
    t = np.linspace(-0.5, 0.5, int(4 * length))
    bend = generator.uniform(-0.12, 0.12) * length * (t**2 * 4 - 1)
    y = size * generator.uniform(0.3, 0.7) + length * t * np.sin(angle) + bend * np.cos(angle)
    x = size * generator.uniform(0.3, 0.7) + length * t * np.cos(angle) - bend * np.sin(angle)
    return _painted(surface, _trace(y, x, size, generator.uniform(0.6, 1.0)), generator.uniform(0.25, 0.4))


def _crack(surface: Surface, generator: np.random.Generator) -> tuple[Surface, Mask]:
    """A dark random walk of 1 to 2 px that keeps its direction."""
    size = surface.shape[0]
    steps = int(size * generator.uniform(1.2, 2.4))
    heading = generator.uniform(0, 2 * np.pi) + np.cumsum(generator.normal(0, 0.18, steps))
    y = size * generator.uniform(0.35, 0.65) + np.cumsum(np.sin(heading)) * 0.5
    x = size * generator.uniform(0.35, 0.65) + np.cumsum(np.cos(heading)) * 0.5
    return _painted(surface, _trace(y, x, size, generator.uniform(0.7, 1.1)), -generator.uniform(0.3, 0.45))


def _pit(surface: Surface, generator: np.random.Generator) -> tuple[Surface, Mask]:
    """A few dark round holes of 2 to 5 px radius with a bright rim on one side."""
    size = surface.shape[0]
    shade, rim = np.zeros_like(surface), np.zeros_like(surface)
    yy, xx = np.mgrid[:size, :size]
    for _ in range(int(generator.integers(1, 5))):
        y, x = generator.uniform(0.15, 0.85, 2) * size
        radius = generator.uniform(2, 5)
        shade = np.maximum(shade, 1 / (1 + np.exp(2 * (np.hypot(yy - y, xx - x) - radius))))
        rim = np.maximum(rim, np.exp(-((np.hypot(yy - y - 1, xx - x - 1) - radius) ** 2)) * (yy + xx > y + x))
    image = surface * (1 - 0.65 * shade) + 0.12 * rim * (1 - shade)
    return _clipped(image), (shade > 0.3) | (rim > 0.5)


def _stain(surface: Surface, generator: np.random.Generator) -> tuple[Surface, Mask]:
    """A soft darker patch with a ragged border; the texture shows through."""
    size = surface.shape[0]
    yy, xx = np.mgrid[:size, :size]
    y, x = generator.uniform(0.3, 0.7, 2) * size
    ragged = _unit(np.asarray(ndimage.gaussian_filter(_noise(size, generator), 5))) * size * 0.02
    distance = np.hypot(yy - y, (xx - x) * generator.uniform(0.6, 1.6)) + ragged
    amount = 1 / (1 + np.exp((distance - size * generator.uniform(0.07, 0.14)) / 1.5))
    return _clipped(surface * (1 - generator.uniform(0.3, 0.45) * amount)), amount > 0.5


DEFECTS: dict[str, Draw] = {"crack": _crack, "pit": _pit, "scratch": _scratch, "stain": _stain}


def _trace(y: NDArray[np.float64], x: NDArray[np.float64], size: int, width: float) -> Surface:
    """Coverage in [0, 1] of a line of about 2 * `width` px through the given points."""
    canvas = np.ones((size, size), bool)
    inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
    canvas[y[inside].astype(int), x[inside].astype(int)] = False
    distance = ndimage.distance_transform_edt(canvas)
    return np.clip(width + 0.5 - np.asarray(distance), 0, 1).astype(np.float32)


def _painted(surface: Surface, coverage: Surface, change: float) -> tuple[Surface, Mask]:
    return _clipped(surface + change * coverage), coverage > 0.3


def _quantised(image: Surface, material: str) -> Image:
    if material == "metal":
        return Image(np.rint(image * 65535).astype(np.uint16), "png", 65535)
    return Image(np.rint(image * 255).astype(np.uint8), "png", 255)


def _empty(surface: Surface) -> Mask:
    return np.zeros(surface.shape, bool)


def _noise(size: int, generator: np.random.Generator) -> Surface:
    return generator.standard_normal((size, size)).astype(np.float32)


def _unit(image: NDArray[np.floating]) -> Surface:
    return ((image - image.mean()) / image.std()).astype(np.float32)


def _clipped(image: NDArray[np.floating]) -> Surface:
    return np.clip(image, 0, 1).astype(np.float32)
