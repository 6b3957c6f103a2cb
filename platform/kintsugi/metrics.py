"""Fidelity of one restored image to its clean original, and of an output to its own input.

All functions take float arrays in [0, 1] of shape (H, W) or (H, W, C) and masks of shape (H, W) bool.

Two conventions of "defect PSNR" exist and are kept apart by name. `defect_psnr` is the PSNR over the
mask's pixels. `defect_psnr_zeroed` is the PSNR of both images multiplied by the mask, as the published recipe
reports it: zeros outside the mask agree perfectly, so it equals `defect_psnr - 10 log10(mask fraction)`, and
an image with its defect erased still scores 40 dB. It is for comparison only; nothing is decided on it.

Fidelity alone rewards invention and erasure, so `contrast_kept` tells what is left of a defect and `altered` what
was done to the background; the two are read as a pair.
"""

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from kornia.metrics import ssim as kornia_ssim
from numpy.typing import NDArray
from scipy import ndimage

from kintsugi.errors import DataError, KintsugiError

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

MAX_DB = 100.0
"""PSNR of identical images, so that means stay finite."""

SMALL_DEFECT = 0.05
"""A defect is small where its mask covers less than this share of the image."""

LOWER_IS_BETTER = frozenset(
    {"background_altered", "background_invented", "background_erased", "lpips", "aligned_lpips"}
)
"""Figures of which less is better; of all others more is."""

_RING = (2.0, 7.0)
_LEAST_CONTRAST = 4 / 255


def psnr(output: Array, clean: Array) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1."""
    return _decibel(float(np.mean(np.square(output.astype(np.float64) - clean))))


def ssim_map(output: Array, clean: Array) -> Array:
    """SSIM at each pixel, (H, W), averaged over channels (Wang et al., TIP 2004: 11 px Gaussian window, sigma 1.5).

    Windows reach over the border into the mirrored image; one that is smaller than that is mirrored repeatedly.
    """
    pad = 5 if min(output.shape[:2]) <= 5 else 0
    first, second = (_nchw(_mirrored(image, pad)) for image in (output, clean))
    planes = kornia_ssim(first, second, 11, max_val=1.0)[0].mean(0).numpy()
    return planes[pad : planes.shape[0] - pad, pad : planes.shape[1] - pad]


def ssim(output: Array, clean: Array) -> float:
    """Mean SSIM over windows that lie wholly inside the image."""
    return _inside(ssim_map(output, clean))


def defect_psnr(output: Array, clean: Array, mask: Mask) -> float:
    """PSNR over the mask's pixels, dB; NaN without a defect."""
    if not mask.any():
        return float("nan")
    return psnr(output[mask], clean[mask])


def defect_ssim(output: Array, clean: Array, mask: Mask) -> float:
    """The SSIM map averaged over the mask; NaN without a defect."""
    return _within(ssim_map(output, clean), mask)


def defect_psnr_zeroed(output: Array, clean: Array, mask: Mask) -> float:
    """PSNR of `image * mask`: the published recipe's convention, flattering by -10 log10(mask fraction)."""
    return psnr(_zeroed(output, mask), _zeroed(clean, mask)) if mask.any() else float("nan")


def defect_ssim_zeroed(output: Array, clean: Array, mask: Mask) -> float:
    """SSIM of `image * mask`: the published recipe's convention."""
    return ssim(_zeroed(output, mask), _zeroed(clean, mask)) if mask.any() else float("nan")


def align(output: Array, clean: Array) -> Array:
    """`output` after the one gain, 0 or more, and the offset that bring it closest to `clean` in least squares.

    Exposure that a degradation changed at random cannot be known; without this it would dominate the figures. A
    negative is no exposure, so it becomes flat; a constant clean image tells nothing of the gain, which stays 1, so
    that what an output invents there is not fitted away.
    """
    x, y = output.astype(np.float64).ravel(), clean.astype(np.float64).ravel()
    gain = 1.0
    if y.var() > 1e-12 and x.var() > 1e-12:
        gain = max(0.0, float(((x - x.mean()) * (y - y.mean())).mean() / x.var()))
    return (gain * (output - x.mean()) + y.mean()).astype(np.float32)


def contrast_kept(output: Array, clean: Array, mask: Mask) -> float:
    """The defect's contrast in the output over that in the clean image: 1 kept, 0 erased, negative turned over.

    Contrast is the mean over the mask less the mean over a ring from 2 to 7 px around it, of the channels' mean.
    Signed and not clipped. NaN without a defect, without a ring, or where the clean contrast is below 4/255, too
    little to divide by. Noise hardly touches it, unlike PSNR; blur and erasure do.
    """
    distance = _distance(mask)
    ring = (distance > _RING[0]) & (distance <= _RING[1])
    if not (mask.any() and ring.any()):
        return float("nan")
    before, after = (float(image[mask].mean() - image[ring].mean()) for image in (_grey(clean), _grey(output)))
    return after / before if abs(before) >= _LEAST_CONTRAST else float("nan")


class Alteration(NamedTuple):
    """Shares of the background, 0 to 1, whose structure is not the clean image's; NaN without a background.

    altered: all of it. invented: where the output has more structure than the clean image. erased: where it has
    less.
    """

    altered: float
    invented: float
    erased: float


def altered(output: Array, clean: Array, mask: Mask) -> Alteration:
    """How much of the background was changed.

    Background is what lies more than 3 px from the mask. A pixel is altered where the images, band-passed to
    structure of Gaussian sigma 2 to 12 px, differ by more than 8/255 of full scale; it is invented or erased as the
    band's energy around it (Gaussian sigma 4 px) is higher or lower in the output than in the clean image.
    """
    background = _distance(mask) > _MARGIN
    if not background.any():
        return Alteration(math.nan, math.nan, math.nan)
    before, after = _band(_grey(clean)), _band(_grey(output))
    changed = (np.abs(after - before) > _VISIBLE) & background
    more = ndimage.gaussian_filter(np.square(after) - np.square(before), _AROUND) > 0
    total = int(background.sum())
    parts = [int(part.sum()) / total for part in (changed, changed & more, changed & ~more)]
    return Alteration(*parts)


@dataclass(frozen=True)
class Fidelity:
    """All figures of one image; the defect ones are NaN where it has no defect.

    `contrast_kept` and `background_*` are those of the aligned output. `small_contrast_kept` is `contrast_kept` where
    the mask covers less than 5% of the image, else NaN.
    """

    psnr: float
    ssim: float
    defect_psnr: float
    defect_ssim: float
    aligned_psnr: float
    aligned_ssim: float
    aligned_defect_psnr: float
    aligned_defect_ssim: float
    contrast_kept: float
    small_contrast_kept: float
    background_altered: float
    background_invented: float
    background_erased: float
    defect_psnr_zeroed: float
    defect_ssim_zeroed: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def fidelity(output: Array, clean: Array, mask: Mask) -> Fidelity:
    """Compare an output with its clean original.

    Raises:
        DataError: the two images or the mask differ in size, or an image holds NaN or infinity.
    """
    check_comparable(output, clean, mask)
    aligned = align(output, clean)
    plain_ssim, aligned_ssim = ssim_map(output, clean), ssim_map(aligned, clean)
    kept, background = contrast_kept(aligned, clean, mask), altered(aligned, clean, mask)
    return Fidelity(
        psnr=psnr(output, clean),
        ssim=_inside(plain_ssim),
        defect_psnr=defect_psnr(output, clean, mask),
        defect_ssim=_within(plain_ssim, mask),
        aligned_psnr=psnr(aligned, clean),
        aligned_ssim=_inside(aligned_ssim),
        aligned_defect_psnr=defect_psnr(aligned, clean, mask),
        aligned_defect_ssim=_within(aligned_ssim, mask),
        contrast_kept=kept,
        small_contrast_kept=kept if mask.mean() < SMALL_DEFECT else math.nan,
        background_altered=background.altered,
        background_invented=background.invented,
        background_erased=background.erased,
        defect_psnr_zeroed=defect_psnr_zeroed(output, clean, mask),
        defect_ssim_zeroed=defect_ssim_zeroed(output, clean, mask),
    )


def check_comparable(output: Array, clean: Array, mask: Mask) -> None:
    """Raise a DataError that names what is wrong, unless the three belong together and are finite."""
    if output.shape != clean.shape:
        raise DataError(f"the output is {_px(output)} but the clean image {_px(clean)}: compare images of one size")
    if mask.shape != clean.shape[:2]:
        raise DataError(f"the mask is {_px(mask)} but the clean image {_px(clean)}: give them one size")
    for name, image in (("output", output), ("clean image", clean)):
        if not (finite := np.isfinite(image)).all():
            raise DataError(f"the {name} holds {int((~finite).sum())} values that are not finite: it cannot be scored")


class Lpips:
    """Learned perceptual distance, 0 for identical images (Zhang et al., CVPR 2018, version 0.1, AlexNet).

    Never downloads: the backbone's weights are taken from torch hub's cache.
    """

    BACKBONE = "alexnet-owt-7be5be79.pth"
    SMALLEST = 32
    """The network needs so many pixels a side; below, the distance is NaN."""

    def __init__(self) -> None:
        """Raises KintsugiError where the weights are not at hand."""
        path = Path(torch.hub.get_dir()) / "checkpoints" / self.BACKBONE
        if not path.is_file():
            raise KintsugiError(
                f"LPIPS needs torchvision's AlexNet weights: put {self.BACKBONE} into torch hub's folder 'checkpoints'"
            )
        # torchvision takes seconds to import, so only those who have the weights wait for it.
        import lpips

        with warnings.catch_warnings(), torch.random.fork_rng([]):
            warnings.simplefilter("ignore")
            self._network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        backbone = self._network.net
        names = {name: f"features.{name.split('.', 1)[1]}" for name in backbone.state_dict()}
        backbone.load_state_dict({name: weights[key] for name, key in names.items()})

    @torch.inference_mode()
    def __call__(self, output: Array, clean: Array) -> float:
        """Of two images in [0, 1]; grey is shown as RGB, what lies outside [0, 1] is clipped."""
        if min(clean.shape[:2]) < self.SMALLEST:
            return float("nan")
        planes = [_nchw(image).clamp(0, 1) for image in (output, clean)]
        colour = [p if p.shape[1] == 3 else p.mean(1, keepdim=True).expand(-1, 3, -1, -1) for p in planes]
        return float(self._network(colour[0], colour[1], normalize=True))


def score(psnr_gain: float, defect_psnr_gain: float) -> float:
    """The worse of two gains in dB: neither overall nor defect fidelity can be bought with the other."""
    return psnr_gain if math.isnan(defect_psnr_gain) else min(psnr_gain, defect_psnr_gain)


_FINE, _COARSE = 2.0, 12.0
_VISIBLE = 8 / 255
_AROUND = 4.0
_MARGIN = 3


def _band(image: Array) -> Array:
    fine, coarse = (ndimage.gaussian_filter(image, sigma) for sigma in (_FINE, _COARSE))
    return (fine - coarse).astype(np.float32, copy=False)


def _grey(image: Array) -> Array:
    return image if image.ndim == 2 else image.mean(axis=2, dtype=np.float32)


def _distance(mask: Mask) -> NDArray[np.float64]:
    """Distance of each pixel to the mask, px; infinite where the mask is empty."""
    return np.asarray(ndimage.distance_transform_edt(~mask)) if mask.any() else np.full(mask.shape, np.inf)


def _mirrored(image: Array, pad: int) -> Array:
    return np.pad(image, ((pad, pad), (pad, pad), *((0, 0),) * (image.ndim - 2)), "symmetric") if pad else image


def _px(image: NDArray[np.generic]) -> str:
    return f"{' x '.join(str(side) for side in (image.shape[1], image.shape[0], *image.shape[2:]))} px"


def _inside(similarity: Array) -> float:
    """The mean over windows that lie wholly inside the image, or over all where there is none."""
    return float((similarity[5:-5, 5:-5] if min(similarity.shape) > 10 else similarity).mean())


def _within(similarity: Array, mask: Mask) -> float:
    return float(similarity[mask].mean()) if mask.any() else float("nan")


def _zeroed(image: Array, mask: Mask) -> Array:
    return np.where(mask if image.ndim == 2 else mask[..., None], image, np.float32(0))


def _nchw(image: Array) -> torch.Tensor:
    planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes, np.float32))[None]


def _decibel(mse: float) -> float:
    return MAX_DB if mse <= 10 ** (-MAX_DB / 10) else -10 * float(np.log10(mse))
