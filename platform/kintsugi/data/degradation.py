"""How a clean image becomes what a poor camera would have seen.

Pure, seeded and composable: `(image, generator) -> image`, float32 in [0, 1], shaped (H, W) or (H, W, 3).
Steps run in the order of physics whatever the order they are given in: optics, exposure, sensor (which
quantises to the camera's levels), codec. Each step draws its own strength from a (low, high) range.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kintsugi.imaging import Image, decode, encode
from kintsugi.sections import DegradationConfig, Preset

Unit = NDArray[np.float32]
Range = tuple[float, float]


def generator_for(seed: int, *parts: str | int) -> np.random.Generator:
    """A generator that depends on these values alone, the same in every process and on every machine."""
    key = hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big")))


class Stage(IntEnum):
    """Where in the camera a step happens."""

    OPTICS = 0
    EXPOSURE = 1
    SENSOR = 2
    CODEC = 3


class Pair(NamedTuple):
    """A degraded image, and the clean one under the same exposure: `exposed = gain * clean + offset`, clipped."""

    degraded: Unit
    exposed: Unit
    gain: float


class Degradation(ABC):
    """`reach`: how far from a pixel, in px, lies what can change it; a crop needs that much around it."""

    reach: int

    def __call__(self, image: Unit, generator: np.random.Generator, levels: int = 255) -> Unit:
        """The degraded image; `levels` is the camera's white level, whose steps the result keeps to."""
        return self.pair(image, generator, levels).degraded

    @abstractmethod
    def pair(self, image: Unit, generator: np.random.Generator, levels: int = 255) -> Pair:
        """The degraded image with what a restoration that leaves the exposure alone should make of it."""


class Step(ABC):
    """One cause. Values may leave [0, 1] between steps."""

    stage: ClassVar[Stage]

    @property
    def reach(self) -> int:
        return 0

    @abstractmethod
    def __call__(self, image: Unit, generator: np.random.Generator) -> Unit: ...


@dataclass(frozen=True)
class MotionBlur(Step):
    """The part moved while the shutter was open: a line of `length` px at `angle` radians from the horizontal."""

    length: Range
    angle: Range = (0.0, np.pi)
    stage: ClassVar[Stage] = Stage.OPTICS

    @property
    def reach(self) -> int:
        return int(self.length[1]) // 2 + 2

    def __call__(self, image: Unit, generator: np.random.Generator) -> Unit:
        length, angle = generator.uniform(*self.length), generator.uniform(*self.angle)
        return _filter(image, _line(length, angle)) if length > 1 else image


@dataclass(frozen=True)
class Defocus(Step):
    """The part is out of focus: a disc of `radius` px."""

    radius: Range
    stage: ClassVar[Stage] = Stage.OPTICS

    @property
    def reach(self) -> int:
        return int(self.radius[1]) + 2

    def __call__(self, image: Unit, generator: np.random.Generator) -> Unit:
        return _filter(image, _disc(generator.uniform(*self.radius)))


@dataclass(frozen=True)
class Exposure(Step):
    """Light times `gain` plus `offset`, which is haze or a raised black level."""

    gain: Range
    offset: Range = (0.0, 0.0)
    stage: ClassVar[Stage] = Stage.EXPOSURE

    def __call__(self, image: Unit, generator: np.random.Generator) -> Unit:
        gain, offset = self.draw(generator)
        return image * np.float32(gain) + np.float32(offset)

    def draw(self, generator: np.random.Generator) -> tuple[float, float]:
        """Gain and offset."""
        return generator.uniform(*self.gain), generator.uniform(*self.offset)


@dataclass(frozen=True)
class ShotNoise(Step):
    """Poisson noise of a sensor that counts `peak` photons at full scale."""

    peak: Range
    stage: ClassVar[Stage] = Stage.SENSOR

    def __call__(self, image: Unit, generator: np.random.Generator) -> Unit:
        peak = generator.uniform(*self.peak)
        return (generator.poisson(np.clip(image, 0, None) * peak) / peak).astype(np.float32)


@dataclass(frozen=True)
class GaussianNoise(Step):
    """Read noise of `sigma` (of full scale), correlated over a Gaussian of `grain` px; below 0.25 px it is white."""

    sigma: Range
    grain: Range = (0.0, 0.0)
    stage: ClassVar[Stage] = Stage.SENSOR

    def __call__(self, image: Unit, generator: np.random.Generator) -> Unit:
        sigma, grain = generator.uniform(*self.sigma), generator.uniform(*self.grain)
        noise = generator.standard_normal(image.shape, dtype=np.float32)
        if grain > 0.25:
            taps = cv2.getGaussianKernel(7, grain)
            # The norm of the separable kernel is sum(taps**2); dividing by it keeps the variance at 1.
            noise = np.asarray(cv2.sepFilter2D(noise, cv2.CV_32F, taps, taps) / (taps**2).sum(), np.float32)
        return image + np.asarray(sigma * noise, np.float32)


@dataclass(frozen=True)
class Jpeg(Step):
    """A lossy 8-bit file in between, of a quality from this range."""

    quality: tuple[int, int]
    stage: ClassVar[Stage] = Stage.CODEC

    @property
    def reach(self) -> int:
        return 8

    def __call__(self, image: Unit, generator: np.random.Generator) -> Unit:
        quality = int(generator.integers(*self.quality, endpoint=True))
        pixels = np.rint(image * 255).astype(np.uint8)
        return decode(encode(Image(pixels, "jpeg"), quality=quality)).to_unit()


class Camera(Degradation):
    """Steps in the order of physics, with clipping and quantisation where the sensor is read."""

    def __init__(self, *steps: Step) -> None:
        self.steps: tuple[Step, ...] = tuple(sorted(steps, key=lambda step: step.stage))
        self.reach = sum(step.reach for step in self.steps)

    def pair(self, image: Unit, generator: np.random.Generator, levels: int = 255) -> Pair:
        exposed, total = image, 1.0
        for step in self.steps:
            if isinstance(step, Exposure):
                gain, offset = step.draw(generator)
                image, exposed = (part * np.float32(gain) + np.float32(offset) for part in (image, exposed))
                total *= gain
                continue
            if step.stage is Stage.CODEC:
                image = _quantise(image, levels)
            image = step(image, generator)
        return Pair(_quantise(image, levels), np.clip(exposed, 0, 1), total)


class Choice(Degradation):
    """One degradation for each image, drawn by its share."""

    def __init__(self, options: Sequence[Degradation], shares: Sequence[float]) -> None:
        self.options = tuple(options)
        self.shares: NDArray[np.float64] = np.asarray(shares, np.float64) / sum(shares)
        self.reach = max(option.reach for option in self.options)

    def pair(self, image: Unit, generator: np.random.Generator, levels: int = 255) -> Pair:
        option = self.options[int(generator.choice(len(self.options), p=self.shares))]
        return option.pair(image, generator, levels)


def _of_255(low: float, high: float) -> Range:
    return low / 255, high / 255


PRESETS: Mapping[Preset, Degradation] = {
    # What the published recipe was trained on: near-horizontal motion, flat contrast, strong noise.
    "kla": Camera(
        MotionBlur((7, 15), (-0.14, 0.14)),
        Exposure((0.78, 0.95), (0.03, 0.12)),
        GaussianNoise(_of_255(12, 24), (0, 0.6)),
    ),
    "motion": Camera(MotionBlur((5, 17)), GaussianNoise(_of_255(3, 8))),
    "defocus": Camera(Defocus((1.5, 4)), GaussianNoise(_of_255(3, 10))),
    "noise": Camera(GaussianNoise(_of_255(15, 40), (0, 0.6))),
    "lowlight": Camera(Exposure((0.25, 0.5)), ShotNoise((150, 600)), GaussianNoise(_of_255(2, 5))),
    "jpeg": Camera(GaussianNoise(_of_255(2, 6)), Jpeg((12, 40))),
    "mixed": Camera(
        MotionBlur((3, 11)),
        Defocus((0.5, 2)),
        Exposure((0.5, 1)),
        ShotNoise((200, 1000)),
        GaussianNoise(_of_255(5, 15)),
        Jpeg((40, 80)),
    ),
    # Nothing to restore: what a model must learn to leave alone.
    "clean": Camera(),
}


def build_degradation(config: DegradationConfig) -> Degradation:
    """One preset for each image, by its share."""
    wanted = [(preset, config.presets.get(name, 0.0)) for name, preset in PRESETS.items()]
    options, shares = zip(*((preset, share) for preset, share in wanted if share > 0), strict=True)
    return options[0] if len(options) == 1 else Choice(options, shares)


def _quantise(image: Unit, levels: int) -> Unit:
    # In float64: 65535 levels do not survive float32 rounding half-way between two of them.
    return (np.rint(np.clip(image, 0, 1).astype(np.float64) * levels) / levels).astype(np.float32)


def _filter(image: Unit, kernel: NDArray[np.float32]) -> Unit:
    return np.asarray(cv2.filter2D(image, cv2.CV_32F, kernel, borderType=cv2.BORDER_REFLECT_101), np.float32)


def _line(length: float, angle: float) -> NDArray[np.float32]:
    """A line through the middle, laid on the grid by bilinear weights; it sums to 1."""
    side = 2 * (int(length) // 2 + 1) + 1
    along = np.linspace(-0.5, 0.5, int(length * 16)) * (length - 1)
    x, y = side // 2 + along * np.cos(angle), side // 2 - along * np.sin(angle)
    grid = np.arange(side)
    near_x = np.clip(1 - np.abs(grid - x[:, None]), 0, None)
    near_y = np.clip(1 - np.abs(grid - y[:, None]), 0, None)
    kernel = near_y.T @ near_x
    return (kernel / kernel.sum()).astype(np.float32)


def _disc(radius: float, fine: int = 8) -> NDArray[np.float32]:
    """A disc with soft rim (each cell is the mean of `fine` x `fine` points); it sums to 1."""
    side = 2 * int(np.ceil(radius)) + 1
    axis = (np.arange(side * fine) + 0.5) / fine - side / 2
    inside = (axis[:, None] ** 2 + axis[None, :] ** 2 <= radius**2).astype(np.float64)
    kernel = inside.reshape(side, fine, side, fine).mean((1, 3))
    return (kernel / kernel.sum()).astype(np.float32)
