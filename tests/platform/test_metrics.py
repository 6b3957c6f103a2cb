import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kintsugi import metrics


def noisy(shape: tuple[int, ...] = (64, 80), seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    clean = generator.random(shape, np.float32)
    output = np.clip(clean + 0.1 * generator.standard_normal(shape, np.float32), 0, 1)
    mask = np.zeros(shape[:2], bool)
    mask[20:30, 15:45] = True
    return output, clean, mask


@pytest.mark.parametrize("shape", [(64, 80), (64, 80, 3)])
def test_psnr_and_ssim_equal_the_reference_implementation(shape: tuple[int, ...]) -> None:
    output, clean, _ = noisy(shape)
    axis = None if len(shape) == 2 else 2
    expected = structural_similarity(
        clean, output, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=axis
    )
    assert metrics.psnr(output, clean) == pytest.approx(peak_signal_noise_ratio(clean, output, data_range=1), abs=1e-4)
    assert metrics.ssim(output, clean) == pytest.approx(expected, abs=1e-5)


def test_zeroed_defect_psnr_exceeds_the_masked_one_by_the_mask_fraction() -> None:
    output, clean, mask = noisy()
    found = metrics.fidelity(output, clean, mask)
    assert found.defect_psnr_zeroed == pytest.approx(found.defect_psnr - 10 * math.log10(mask.mean()), abs=1e-4)


def test_an_erased_defect_fools_the_zeroed_convention_and_not_the_masked_one() -> None:
    clean = np.full((128, 128), 0.6, np.float32)
    mask = np.zeros(clean.shape, bool)
    mask[60:64, 60:70] = True
    erased = clean.copy()
    clean[mask] = 0.3
    found = metrics.fidelity(erased, clean, mask)
    assert found.defect_psnr_zeroed > 35
    assert found.defect_psnr < 11


def test_figures_of_a_defect_are_nan_without_one() -> None:
    output, clean, mask = noisy()
    found = metrics.fidelity(output, clean, np.zeros_like(mask)).to_dict()
    assert {name for name, value in found.items() if math.isnan(value)} == {n for n in found if "defect" in n}


def test_alignment_takes_out_gain_and_offset_and_nothing_else() -> None:
    _, clean, _ = noisy()
    assert metrics.psnr(metrics.align(0.5 * clean + 0.2, clean), clean) > 60
    assert np.allclose(metrics.align(np.full_like(clean, 0.4), clean), clean.mean())


def test_identical_images_have_a_finite_psnr() -> None:
    _, clean, _ = noisy()
    assert metrics.psnr(clean, clean) == metrics.MAX_DB


def test_the_score_is_the_worse_gain_and_overall_alone_without_defects() -> None:
    assert metrics.score(4.0, -1.0) == -1.0
    assert metrics.score(4.0, math.nan) == 4.0


def surface(seed: int = 0) -> np.ndarray:
    image = np.random.default_rng(seed).standard_normal((160, 160)).astype(np.float32)
    smooth = ndimage.gaussian_filter(image, 6)
    return (0.5 + 0.15 * smooth / smooth.std()).astype(np.float32)


def test_denoising_keeps_structure_and_blurring_does_not() -> None:
    clean = surface()
    degraded = clean + 0.05 * np.random.default_rng(1).standard_normal(clean.shape).astype(np.float32)
    assert metrics.structure(degraded, clean).retention > 0.9
    assert metrics.structure(degraded, clean).added < 0.01
    assert metrics.structure(degraded, ndimage.gaussian_filter(clean, 20)).retention < 0.3


def test_an_invented_spot_is_counted_as_added() -> None:
    clean = surface()
    spot = np.zeros_like(clean)
    spot[70:82, 70:82] = 0.4
    assert metrics.structure(clean, clean).added == 0
    assert metrics.structure(clean, clean + ndimage.gaussian_filter(spot, 1)).added > 0.002
