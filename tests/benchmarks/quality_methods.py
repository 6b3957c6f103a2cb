"""What a restorer is compared with: classical filters, each told what it could not know in the field.

Every one gets the true exposure and noise; Wiener and Richardson-Lucy the true blur as well. Their strengths were
chosen on a validation split of magnetic tiles. A learned model gets nothing but the image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage import restoration

from kintsugi.imaging import Image

Unit = NDArray[np.float32]
_PAD = 24


@dataclass(frozen=True)
class Truth:
    """How an image was degraded: exposure, noise (of full scale, before exposure was undone), blur kernel."""

    gain: float = 1.0
    offset: float = 0.0
    sigma: float = 0.0
    kernel: NDArray[np.float32] | None = None

    def exposed(self, image: Unit) -> Unit:
        """The image as if it had been taken at the clean one's exposure."""
        return ((image - np.float32(self.offset)) / np.float32(self.gain)).astype(np.float32)


Method = Callable[[Image, Truth], Image]


def degraded(image: Image, truth: Truth) -> Image:
    return image


def bilateral(image: Image, truth: Truth) -> Image:
    sigma = max(3 * truth.sigma, 0.01)
    return _answer(image, truth.exposed(cv2.bilateralFilter(image.to_unit(), 9, sigma, 2.5)))


def non_local_means(image: Image, truth: Truth) -> Image:
    return _answer(image, truth.exposed(_non_local_means(image, truth)))


def non_local_means_richardson_lucy(image: Image, truth: Truth) -> Image:
    exposed = np.clip(truth.exposed(_non_local_means(image, truth)), 1e-3, 1)
    if truth.kernel is None:
        return _answer(image, exposed)
    sharp = restoration.richardson_lucy(_padded(exposed), truth.kernel, num_iter=3, clip=True)
    return _answer(image, _cut(sharp))


def wiener(image: Image, truth: Truth) -> Image:
    exposed = _padded(truth.exposed(image.to_unit()))
    kernel = np.ones((1, 1), np.float32) if truth.kernel is None else truth.kernel
    balance = max(WIENER * (truth.sigma / truth.gain * 255) ** 2, 1e-4)
    return _answer(image, _cut(restoration.wiener(exposed, kernel, balance, clip=False)))


def blind_non_local_means(image: Image) -> Image:
    """Non-local means with the noise estimated from the image (Immerkaer, CVIU 1996)."""
    difference = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = cv2.filter2D(image.to_unit(), -1, difference)
    return non_local_means(image, Truth(sigma=float(np.median(np.abs(response))) / 0.6745 / 6))


WIENER, NLM = 0.01, 1.0

METHODS: Mapping[str, Method] = {
    "degraded": degraded,
    "bilateral": bilateral,
    "nlm": non_local_means,
    "nlm+rl": non_local_means_richardson_lucy,
    "wiener": wiener,
}


def _non_local_means(image: Image, truth: Truth) -> Unit:
    levels = np.rint(image.to_unit() * 255).astype(np.uint8)
    strength = NLM * truth.sigma * 255
    return cv2.fastNlMeansDenoising(levels, None, strength, 5, 21).astype(np.float32) / 255


def _padded(image: Unit) -> NDArray[np.float64]:
    return np.pad(image.astype(np.float64), _PAD, mode="reflect")


def _cut(image: NDArray[np.floating]) -> Unit:
    return image[_PAD:-_PAD, _PAD:-_PAD].astype(np.float32)


def _answer(image: Image, unit: Unit) -> Image:
    return image.with_unit(np.clip(unit, 0, 1))
