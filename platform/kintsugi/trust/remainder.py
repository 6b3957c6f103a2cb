"""What of an input its restoration does not explain.

The kernel and offset that bring the output closest to the input are fitted by least squares: they stand for the
blur and gain that the restoration has undone. The remainder, `input - kernel * output - offset`, is noise if it is
faithful; a defect that was erased or invented leaves its shape in it, where a local mean finds it though noise
cancels out. Images are (H, W) float32.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import scipy.fft
import scipy.linalg
from numpy.typing import NDArray

Unit = NDArray[np.float32]
Mask = NDArray[np.bool_]

_REACHES = (0, 4, 8)
"""Radii of the fitted kernels, px: 0 is a gain alone, 8 covers a motion of 17 px."""
_GAINS = (0.5, 2.0)
"""How far the exposure of an output may be from that of its input."""
_SCALES = (3.0, 6.0, 12.0)
"""Gaussian sigmas of the local means, px."""
_SHADING = 32.0
"""What changes over more than this Gaussian sigma, px, is shading and not structure."""
_LEAST_NOISE = 4 / 255
"""Local means are held against at least this much noise: smaller misfits are not worth an alarm."""
_BAND = (2.0, 12.0)
"""Structure whose retention is measured: between these Gaussian sigmas, px."""
_GRAIN = (2.0, 4.0)
"""Where noise that is not white is measured: between these Gaussian sigmas, px."""
_WHITE = 1 / (2 * math.sqrt(math.pi))
"""White noise of deviation 1 keeps a deviation of this / sigma after a Gaussian of `sigma`."""
_BLOCK = 512
"""Kernels of images over twice this side are fitted on blocks of it, px, so that cost grows with the filter alone."""
MAD = 0.6745
"""Median absolute value of a normal variable of deviation 1."""


@dataclass(frozen=True)
class Comparison:
    """What `kintsugi.trust.judge.Trust` says of a whole image, for one channel; `grew`: where structure was added."""

    retention: float
    local_retention: float
    suspicion: Unit
    grew: Mask


def compare(degraded: Unit, restored: Unit) -> Comparison:
    """Hold one channel against its own, by the kernel of those tried that leaves the least to suspect.

    A large kernel explains motion blur, and sharpens where a denoiser has taken out the fine: there a gain fits.
    """
    most = (min(degraded.shape) - 1) // 8
    reaches = sorted({min(reach, most) for reach in _REACHES})
    moments = _Moments.of(degraded, restored, reaches[-1])
    input_noise = max(white_noise(degraded), _coarse_noise(degraded))
    matches = (_match(degraded, restored, moments, reach) for reach in reaches)
    tried = ((_suspicion(degraded - matched, input_noise), matched) for matched in matches)
    suspicion, matched = min(tried, key=lambda pair: float(pair[0].max()))
    before, after = _band(degraded, _BAND), _band(matched, _BAND)
    retention, local = _retention(before, after, input_noise)
    return Comparison(retention, local, suspicion, blur(np.square(after), 4.0) > blur(np.square(before), 4.0))


def deviation(degraded: Unit, restored: Unit) -> Unit:
    """(H, W) local root mean square (Gaussian of 4 px) of what is left after gain and offset, at least one step."""
    remainder = degraded - _match(degraded, restored, _Moments.of(degraded, restored, 0), 0)
    return np.sqrt(np.maximum(blur(np.square(remainder), 4.0), np.float32(1 / 255**2)))


def _suspicion(remainder: Unit, input_noise: float) -> Unit:
    """Largest local mean over scales, in standard deviations.

    The deviation is measured robustly at a fine scale, which has many windows, and follows from there as that of
    white noise, 1 / sigma: at coarse scales structure would set its own limit. It is not below that of the noise in
    the input, most of which a denoiser may have kept in its output.
    """
    flat = remainder - blur(remainder, _SHADING)
    fine = median(np.abs(blur(flat, _GRAIN[0]))) / MAD * _GRAIN[0]
    white = _WHITE * max(white_noise(remainder), input_noise)
    found = np.abs(blur(flat, _SCALES[0])) * np.float32(_SCALES[0])
    for scale in _SCALES[1:]:
        np.maximum(found, np.abs(blur(flat, scale)) * np.float32(scale), out=found)
    return found / np.float32(math.hypot(fine, white, _WHITE * _LEAST_NOISE))


def _retention(before: Unit, after: Unit, noise: float) -> tuple[float, float]:
    """Share of the supported structure that is kept, over the image and in the worst window (Gaussian of 6 px)."""
    least = max(4 * noise * _gain(_BAND), 2 / 255)
    supported = np.abs(before) > least
    energy, kept = np.where(supported, before * before, 0), np.where(supported, before * after, 0)
    there, left = blur(energy, 6.0), blur(kept, 6.0)
    enough = there > least**2 / 2
    if not enough.any():
        return 1.0, 1.0
    local = float((left[enough] / there[enough]).min())
    return float(np.clip(kept.sum() / energy.sum(), 0, 1)), float(np.clip(local, 0, 1))


def white_noise(image: Unit) -> float:
    """Standard deviation of white noise by a Laplacian and its median (Immerkaer, CVIU 1996)."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32) / 6
    return median(np.abs(cv2.filter2D(image, cv2.CV_32F, kernel))) / MAD


def _coarse_noise(image: Unit) -> float:
    """Deviation of the white noise that is as strong as this image's coarse grain, or its texture."""
    return median(np.abs(_band(image, _GRAIN))) / MAD / _gain(_GRAIN)


def median(image: Unit) -> float:
    """Of at most some 16,000 pixels."""
    step = max(1, int(math.sqrt(image.size / 16384)))
    return float(np.median(image[::step, ::step]))


def blur(image: Unit, sigma: float) -> Unit:
    """Gaussian blur; a wide one is computed on a smaller image, where it costs as little as a narrow one."""
    height, width = image.shape
    factor = max(1, int(min(sigma / 2, min(image.shape) / 8)))
    size = -(-width // factor), -(-height // factor)
    small = image if factor == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / factor, borderType=cv2.BORDER_REPLICATE)
    wide = small if factor == 1 else cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(wide, np.float32)


def _band(image: Unit, sigmas: tuple[float, float]) -> Unit:
    return blur(image, sigmas[0]) - blur(image, sigmas[1])


def _gain(sigmas: tuple[float, float]) -> float:
    """Standard deviation that the band leaves of white noise of deviation 1."""
    fine, coarse = sigmas[0] ** 2, sigmas[1] ** 2
    return _WHITE * math.sqrt(1 / fine + 1 / coarse - 4 / (fine + coarse))


@dataclass(frozen=True)
class _Moments:
    """Autocorrelation of the output to lags of 2 `reach`, its correlation with the input to `reach`, and means."""

    reach: int
    auto: NDArray[np.float64]
    cross: NDArray[np.float64]
    restored: float
    degraded: float

    @classmethod
    def of(cls, degraded: Unit, restored: Unit, reach: int) -> "_Moments":
        means = float(degraded.mean()), float(restored.mean())
        auto, cross = np.zeros((4 * reach + 1,) * 2), np.zeros((2 * reach + 1,) * 2)
        for block in _blocks(degraded.shape):
            before, after = degraded[block] - means[0], restored[block] - means[1]
            taper = _taper(before.shape)
            auto += _correlation(after * taper, after * taper, 2 * reach)
            cross += _correlation(before * taper, after * taper, reach)
        return cls(reach, auto, cross, means[1], means[0])


def _taper(shape: tuple[int, ...]) -> Unit:
    """Falls to nothing at the border, which a transform would otherwise join to the other side."""
    height, width = (np.hanning(length + 2)[1:-1] for length in shape)
    return np.sqrt(np.outer(height, width)).astype(np.float32)


def _correlation(one: Unit, other: Unit, lags: int) -> NDArray[np.float64]:
    """Sum of `one` times `other` shifted by (row, column), each from -lags to lags."""
    size = [int(scipy.fft.next_fast_len(length + 2 * lags, real=True) or 0) for length in one.shape]
    spectrum = np.asarray(scipy.fft.rfft2(one, size)) * np.conj(np.asarray(scipy.fft.rfft2(other, size)))
    found = np.asarray(scipy.fft.irfft2(spectrum, size), np.float64)
    at = np.arange(-lags, lags + 1)
    return found.take(at, 0, mode="wrap").take(at, 1, mode="wrap")


def _match(degraded: Unit, restored: Unit, moments: _Moments, reach: int) -> Unit:
    """`kernel * restored + offset`, as close to `degraded` in least squares as a kernel of this reach brings it."""
    kernel = _kernel(moments, reach)
    offset = moments.degraded - float(kernel.sum()) * moments.restored
    if reach == 0:
        return restored * kernel[0, 0] + np.float32(offset)
    turned = np.ascontiguousarray(kernel[::-1, ::-1])
    filtered = cv2.filter2D(restored, cv2.CV_32F, turned, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(filtered, np.float32) + np.float32(offset)


def _kernel(moments: _Moments, reach: int) -> Unit:
    """Solve the normal equations, whose matrix holds the autocorrelation at the difference of two places.

    The sum of the kernel is the gain. It is held within `_GAINS`: on a flat input least squares would fade out all
    of the output, and with it whatever was invented.
    """
    side, middle = 2 * reach + 1, 2 * moments.reach
    power = float(moments.auto[middle, middle])
    if power <= 1e-9:
        return np.zeros((side, side), np.float32)
    lag = np.subtract.outer(np.arange(side), np.arange(side)) + middle
    matrix = moments.auto[lag[:, None, :, None], lag[None, :, None, :]].reshape(side**2, side**2)
    matrix[np.diag_indices(side**2)] += 1e-3 * power
    near = slice(moments.reach - reach, moments.reach + reach + 1)
    wanted = np.stack([moments.cross[near, near].ravel(), np.ones(side**2)], axis=1)
    free, spread = scipy.linalg.solve(matrix, wanted, assume_a="pos").T
    gain = float(free.sum())
    held = free + (float(np.clip(gain, *_GAINS)) - gain) * spread / spread.sum()
    return held.reshape(side, side).astype(np.float32)


def _blocks(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """The whole image, or of a large one up to 16 blocks spread over it."""
    spans: list[list[slice]] = []
    for length in shape:
        side = length if length <= 2 * _BLOCK else _BLOCK
        starts = np.linspace(0, length - side, 1 if side == length else 4).astype(int)
        spans.append([slice(start, start + side) for start in starts])
    return [(rows, columns) for rows in spans[0] for columns in spans[1]]
