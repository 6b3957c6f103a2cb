"""Fidelity of one restored image to its clean original, and of an output to its own input.

All functions take float arrays in [0, 1] of shape (H, W) or (H, W, C) and masks of shape (H, W) bool.

Two conventions of "defect PSNR" exist and are kept apart by name. `defect_psnr` is the PSNR over the
mask's pixels. `defect_psnr_zeroed` is the PSNR of both images multiplied by the mask, as the published recipe
reports it: zeros outside the mask agree perfectly, so it equals `defect_psnr - 10 log10(mask fraction)`, and
an image with its defect erased still scores 40 dB. It is for comparison only; nothing is decided on it.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from kornia.metrics import ssim as kornia_ssim
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

MAX_DB = 100.0
"""PSNR of identical images, so that means stay finite."""


def psnr(output: Array, clean: Array) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1."""
    return _decibel(float(np.mean(np.square(output.astype(np.float64) - clean))))


def ssim_map(output: Array, clean: Array) -> Array:
    """SSIM at each pixel, (H, W), averaged over channels (Wang et al., TIP 2004: 11 px Gaussian window, sigma 1.5)."""
    planes = kornia_ssim(_nchw(output), _nchw(clean), 11, max_val=1.0)
    return planes[0].mean(0).numpy()


def ssim(output: Array, clean: Array) -> float:
    """Mean SSIM over windows that lie wholly inside the image."""
    if min(output.shape[:2]) <= 10:
        return float(ssim_map(output, clean).mean())
    return float(ssim_map(output, clean)[5:-5, 5:-5].mean())


def defect_psnr(output: Array, clean: Array, mask: Mask) -> float:
    """PSNR over the mask's pixels, dB; NaN without a defect."""
    if not mask.any():
        return float("nan")
    return psnr(output[mask], clean[mask])


def defect_ssim(output: Array, clean: Array, mask: Mask) -> float:
    """The SSIM map averaged over the mask; NaN without a defect."""
    return float(ssim_map(output, clean)[mask].mean()) if mask.any() else float("nan")


def defect_psnr_zeroed(output: Array, clean: Array, mask: Mask) -> float:
    """PSNR of `image * mask`: the published recipe's convention, flattering by -10 log10(mask fraction)."""
    return psnr(_zeroed(output, mask), _zeroed(clean, mask)) if mask.any() else float("nan")


def defect_ssim_zeroed(output: Array, clean: Array, mask: Mask) -> float:
    """SSIM of `image * mask`: the published recipe's convention."""
    return ssim(_zeroed(output, mask), _zeroed(clean, mask)) if mask.any() else float("nan")


def align(output: Array, clean: Array) -> Array:
    """`output` after the one gain and offset that bring it closest to `clean` in least squares.

    Exposure that a degradation changed at random cannot be known; without this it would dominate the figures.
    """
    x, y = output.astype(np.float64).ravel(), clean.astype(np.float64).ravel()
    variance = x.var()
    gain = ((x - x.mean()) * (y - y.mean())).mean() / variance if variance > 1e-12 else 0.0
    return (gain * (output - x.mean()) + y.mean()).astype(np.float32)


@dataclass(frozen=True)
class Fidelity:
    """All figures of one image; the defect ones are NaN where it has no defect."""

    psnr: float
    ssim: float
    defect_psnr: float
    defect_ssim: float
    aligned_psnr: float
    aligned_ssim: float
    aligned_defect_psnr: float
    aligned_defect_ssim: float
    defect_psnr_zeroed: float
    defect_ssim_zeroed: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def fidelity(output: Array, clean: Array, mask: Mask) -> Fidelity:
    """Compare an output with its clean original."""
    aligned = align(output, clean)
    return Fidelity(
        psnr=psnr(output, clean),
        ssim=ssim(output, clean),
        defect_psnr=defect_psnr(output, clean, mask),
        defect_ssim=defect_ssim(output, clean, mask),
        aligned_psnr=psnr(aligned, clean),
        aligned_ssim=ssim(aligned, clean),
        aligned_defect_psnr=defect_psnr(aligned, clean, mask),
        aligned_defect_ssim=defect_ssim(aligned, clean, mask),
        defect_psnr_zeroed=defect_psnr_zeroed(output, clean, mask),
        defect_ssim_zeroed=defect_ssim_zeroed(output, clean, mask),
    )


def score(psnr_gain: float, defect_psnr_gain: float) -> float:
    """The worse of two gains in dB: neither overall nor defect fidelity can be bought with the other."""
    return psnr_gain if math.isnan(defect_psnr_gain) else min(psnr_gain, defect_psnr_gain)


@dataclass(frozen=True)
class Structure:
    """What a restoration did to the structure of its input; needs no clean original.

    retention: share of the input's structure above its noise that the output keeps, 0 to 1.
    added: share of pixels whose structure differs from the input's by more than its noise explains, 0 to 1.
    """

    retention: float
    added: float


_FINE, _COARSE = 2.0, 12.0
_VISIBLE = 8 / 255


def structure(degraded: Array, output: Array) -> Structure:
    """Compare an output with its own input in a band of structure sizes (Gaussian sigma 2 to 12 px).

    Noise that the input carries is estimated from its Laplacian (Immerkaer, CVIU 1996) and scaled by the
    band's own gain, so that denoising alone is not counted as a change of structure.
    """
    before, after = _grey(degraded), _grey(align(output, degraded))
    band_in, band_out = _band(before), _band(after)
    noise = _noise_sigma(before) * _band_gain()
    supported = np.abs(band_in) > max(4 * noise, 2 / 255)
    energy = float(np.square(band_in[supported]).sum())
    kept = float((band_in[supported] * band_out[supported]).sum()) / energy if energy > 0 else 1.0
    changed = np.abs(band_out - band_in) > max(_VISIBLE, 4 * noise)
    return Structure(retention=float(np.clip(kept, 0, 1)), added=float(changed.mean()))


def _band(image: Array) -> Array:
    fine, coarse = (ndimage.gaussian_filter(image, sigma) for sigma in (_FINE, _COARSE))
    return (fine - coarse).astype(np.float32, copy=False)


def _band_gain() -> float:
    """Standard deviation that the band leaves of white noise of deviation 1."""
    fine, coarse = _FINE**2, _COARSE**2
    squared = (1 / (4 * np.pi)) * (1 / fine + 1 / coarse - 4 / (fine + coarse))
    return float(np.sqrt(squared))


def _noise_sigma(image: Array) -> float:
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = ndimage.convolve(image, kernel)
    return float(np.median(np.abs(response)) / 0.6745 / 6)


def _grey(image: Array) -> Array:
    return image if image.ndim == 2 else image.mean(axis=2, dtype=np.float32)


def _zeroed(image: Array, mask: Mask) -> Array:
    return np.where(mask if image.ndim == 2 else mask[..., None], image, np.float32(0))


def _nchw(image: Array) -> torch.Tensor:
    planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes, np.float32))[None]


def _decibel(mse: float) -> float:
    return MAX_DB if mse <= 10 ** (-MAX_DB / 10) else -10 * float(np.log10(mse))
