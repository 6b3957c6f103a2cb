import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kintsugi import metrics
from kintsugi.errors import DataError, KintsugiError


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
    assert {name for name, value in found.items() if math.isnan(value)} == {
        n for n in found if "defect" in n or "contrast" in n
    }


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


def test_a_negative_is_no_exposure_and_a_constant_image_hides_no_invention() -> None:
    _, clean, _ = noisy()
    assert np.allclose(metrics.align(1 - clean, clean), clean.mean())
    flat, spotted = np.full((32, 32), 0.5, np.float32), np.full((32, 32), 0.7, np.float32)
    spotted[10:14, 10:14] = 0.9
    assert np.abs(metrics.align(spotted, flat) - flat).max() > 0.19


def plate(contrast: float = -0.2) -> tuple[np.ndarray, np.ndarray]:
    """A textured surface with a defect of 8 x 8 px."""
    clean = surface() * 0.5 + 0.3
    mask = np.zeros(clean.shape, bool)
    mask[76:84, 60:68] = True
    clean[mask] += np.float32(contrast)
    return clean, mask


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0, -1.0, 1.5])
def test_contrast_kept_is_the_share_of_the_defect_that_is_left(share: float) -> None:
    clean = np.full((60, 60), 0.6, np.float32)
    mask = np.zeros(clean.shape, bool)
    mask[20:25, 30:36] = True
    output = clean.copy()
    clean[mask], output[mask] = 0.4, 0.6 - 0.2 * share
    assert metrics.contrast_kept(output, clean, mask) == pytest.approx(share, abs=1e-5)


def test_contrast_kept_is_absent_where_it_means_nothing() -> None:
    clean, mask = plate()
    flat = np.full_like(clean, 0.5)
    for image, where in ((clean, np.zeros_like(mask)), (clean, np.ones_like(mask)), (flat, mask)):
        assert math.isnan(metrics.contrast_kept(image, image, where))
    large = ndimage.binary_dilation(mask, iterations=16)
    assert math.isnan(metrics.fidelity(clean, clean, large).small_contrast_kept)
    assert metrics.fidelity(clean, clean, mask).small_contrast_kept == pytest.approx(1)


def test_structure_that_was_added_is_invented_and_structure_that_was_lost_is_erased() -> None:
    clean, mask = plate()
    spotted = clean.copy()
    spotted[120:130, 120:130] += 0.3
    found = metrics.altered(spotted, clean, mask)
    assert 60 / clean.size < found.invented < 600 / clean.size
    assert found.erased < found.invented / 5
    lost = metrics.altered(np.full_like(clean, clean.mean()), clean, mask)
    assert lost.erased > 0.2 and lost.invented == 0
    assert found.altered == pytest.approx(found.invented + found.erased)
    assert metrics.altered(clean, clean, mask) == (0, 0, 0)


def test_a_change_of_the_defect_alone_is_no_change_of_the_background() -> None:
    clean, mask = plate(-0.05)
    changed = clean.copy()
    changed[mask] -= 0.04
    assert metrics.altered(changed, clean, ndimage.binary_dilation(mask, iterations=6)).altered == 0
    assert math.isnan(metrics.altered(changed, clean, np.ones_like(mask)).altered)


def test_what_fools_psnr_or_the_zeroed_convention_does_not_fool_the_true_measures() -> None:
    clean, mask = plate()
    generator = np.random.default_rng(0)
    degraded = ndimage.gaussian_filter(clean, (0, 2)) * 0.85 + 0.05
    degraded += 0.06 * generator.standard_normal(clean.shape).astype(np.float32)
    erased = clean.copy()
    erased[mask] += 0.2
    outputs = {
        "black": np.zeros_like(clean),
        "grey": np.full_like(clean, clean.mean()),
        "degraded": degraded,
        "erased": erased,
        "half": clean * 0.5 + ndimage.gaussian_filter(clean, 2) * 0.5,
    }
    found = {name: metrics.fidelity(output, clean, mask) for name, output in outputs.items()}
    assert all(found[name].defect_psnr_zeroed > 30 for name in ("black", "grey", "erased"))
    assert found["erased"].psnr > found["degraded"].psnr + 10
    for fooling in ("black", "grey", "erased"):
        assert found[fooling].small_contrast_kept < 0.2 < 0.4 < found["degraded"].small_contrast_kept
        assert found[fooling].aligned_defect_psnr < found["degraded"].aligned_defect_psnr
        assert found[fooling].aligned_defect_psnr < found["half"].aligned_defect_psnr - 5
        assert found[fooling].aligned_defect_ssim < found["half"].aligned_defect_ssim
    assert found["half"].small_contrast_kept > 0.8


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 5), (3, 40), (1, 1, 3), (9, 9, 3)])
def test_tiny_and_constant_images_have_figures(shape: tuple[int, ...]) -> None:
    grey, mask = np.full(shape, 0.5, np.float32), np.zeros(shape[:2], bool)
    same = metrics.fidelity(grey, grey, mask)
    assert (same.psnr, same.aligned_psnr) == (metrics.MAX_DB, metrics.MAX_DB)
    assert same.ssim == pytest.approx(1)
    other = metrics.fidelity(grey * 0, grey, ~mask)
    assert other.defect_psnr == pytest.approx(10 * math.log10(4), abs=1e-4) and other.ssim < 0.1


@pytest.mark.parametrize(
    ("output", "mask", "said"),
    [
        (np.zeros((4, 5), np.float32), np.zeros((4, 4), bool), "mask is 4 x 4 px but the clean image 5 x 4 px"),
        (np.zeros((4, 6), np.float32), np.zeros((4, 5), bool), "output is 6 x 4 px but the clean image 5 x 4 px"),
        (np.zeros((4, 5, 3), np.float32), np.zeros((4, 5), bool), "output is 5 x 4 x 3 px"),
        (np.full((4, 5), np.nan, np.float32), np.zeros((4, 5), bool), "20 values that are not finite"),
        (np.full((4, 5), np.inf, np.float32), np.zeros((4, 5), bool), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_named(output: np.ndarray, mask: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=said):
        metrics.fidelity(output, np.zeros((4, 5), np.float32), mask)


def test_lpips_without_weights_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(KintsugiError, match="alexnet-owt"):
        metrics.Lpips()


def test_lpips_takes_the_backbone_from_the_cache_and_never_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    weights: dict[str, torch.Tensor] = {}
    for layer, shape in shapes.items():
        weights[f"features.{layer}.weight"] = torch.randn(shape, generator=generator) * 0.05
        weights[f"features.{layer}.bias"] = torch.zeros(shape[0])
    (tmp_path / "checkpoints").mkdir()
    torch.save(weights, tmp_path / "checkpoints" / metrics.Lpips.BACKBONE)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    state = torch.get_rng_state()
    lpips = metrics.Lpips()
    assert torch.equal(torch.get_rng_state(), state)
    output, clean, _ = noisy((64, 80))
    assert lpips(clean, clean) == 0
    assert 0 < lpips(clean + 0.3 * (output - clean), clean) < lpips(output, clean)
    assert lpips(np.repeat(output[..., None], 3, 2), np.repeat(clean[..., None], 3, 2)) == pytest.approx(
        lpips(output, clean), rel=1e-4
    )
    assert math.isnan(lpips(output[:16], clean[:16]))
