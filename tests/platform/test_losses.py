import pytest
import torch

from kintsugi.losses import (
    build_loss,
    charbonnier_loss,
    defect_loss,
    edge_loss,
    error_loss,
    frequency_loss,
    invention_loss,
    mask_loss,
    ssim_loss,
)
from kintsugi.models import Prediction
from kintsugi.sections import LossConfig

RECIPE = ("defect", "ssim", "perceptual", "edge", "basic")


def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 10:14, 10:14] = 1
    return torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32), mask


def test_total_is_the_weighted_sum_of_the_parts() -> None:
    output, target, mask = images()
    config = LossConfig()
    terms = build_loss(config, lambda a, b: (a - b).square().mean())(Prediction(output), target, mask)
    expected = sum(getattr(config.weights, name) * terms[name] for name in RECIPE)
    assert torch.allclose(terms["total"], expected)
    assert set(terms) == {"defect", "ssim", "perceptual", "edge", "basic", "total"}


def test_a_perfect_output_costs_nothing() -> None:
    _, target, mask = images()
    terms = build_loss(LossConfig(), lambda a, b: (a - b).abs().mean())(Prediction(target), target, mask)
    assert all(abs(float(value)) < 1e-6 for value in terms.values())


def test_the_defect_part_sees_the_mask_alone_and_does_not_fade_with_its_size() -> None:
    target = torch.zeros(1, 1, 32, 32)
    small, large = torch.zeros_like(target), torch.zeros_like(target)
    small[..., :2, :2], large[..., :16, :16] = 1, 1
    assert defect_loss(target + 0.5 * small, target, small) == pytest.approx(0.5)
    assert defect_loss(target + 0.5 * large, target, large) == pytest.approx(0.5)
    assert defect_loss(target + 0.5 * (1 - small), target, small) == 0
    assert defect_loss(target + 0.5, target, torch.zeros_like(target)) == 0


def test_the_ssim_part_spans_its_whole_range_for_images_between_zero_and_one() -> None:
    output, target, _ = images()
    assert ssim_loss(output, target) > 0.8


def test_the_edge_part_ignores_a_constant_offset() -> None:
    output, target, _ = images()
    assert edge_loss(target + 0.3, target) == pytest.approx(0, abs=1e-6)
    assert edge_loss(output, target) > 0.01


def test_a_part_of_weight_zero_is_not_computed() -> None:
    weights = {"defect": 0.5, "ssim": 0.5, "perceptual": 0, "edge": 0, "basic": 0}
    output, target, mask = images()
    terms = build_loss(LossConfig.model_validate({"weights": weights}), None)(Prediction(output), target, mask)
    assert set(terms) == {"defect", "ssim", "total"}


def test_charbonnier_is_the_absolute_difference_and_smooth_at_zero() -> None:
    target = torch.zeros(1, 1, 8, 8)
    assert charbonnier_loss(target + 0.5, target) == pytest.approx(0.5, abs=1e-4)
    output = target.clone().requires_grad_()
    charbonnier_loss(output, target).backward()
    assert torch.equal(output.grad, torch.zeros_like(target))


def test_the_frequency_part_sees_a_wave_where_it_lies() -> None:
    wave = torch.cos(torch.arange(32) * 2 * torch.pi * 4 / 32).expand(1, 1, 32, 32)
    # One pair of complex entries of 0.1 * 32 / 2 among 2 * 32 * 17 numbers; rfft2 keeps one of the pair.
    assert frequency_loss(0.1 * wave, torch.zeros_like(wave)) == pytest.approx(0.1 * 16 / (2 * 32 * 17), rel=1e-3)


def test_the_defect_map_is_judged_only_where_somebody_drew_the_mask() -> None:
    mask = images()[2]
    right, wrong = 20 * (2 * mask - 1), -20 * (2 * mask - 1)
    assert mask_loss(right, mask) < 0.01 < 5 < mask_loss(wrong, mask)
    half = torch.stack([right[0], wrong[1]])
    assert mask_loss(half, mask, torch.tensor([1.0, 0.0])) < 0.01
    assert mask_loss(half, mask, torch.tensor([0.0, 1.0])) > 5


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_the_error_bound_is_cheapest_at_the_quantile(quantile: float) -> None:
    torch.manual_seed(0)
    target = torch.zeros(1, 1, 100, 100)
    output = torch.rand_like(target)
    grid = torch.arange(0.02, 1, 0.02)
    costs = [error_loss(torch.full_like(target, float(bound)), output, target, quantile) for bound in grid]
    assert float(grid[int(torch.stack(costs).argmin())]) == pytest.approx(quantile, abs=0.03)


def test_invention_counts_structure_on_defect_free_pixels_alone() -> None:
    target, mask = torch.full((1, 1, 96, 96), 0.5), torch.zeros(1, 1, 96, 96)
    blob = target.clone()
    blob[..., 40:56, 40:56] += 0.2
    assert invention_loss(blob, target, mask) > 1e-4
    assert invention_loss(target + 0.1, target, mask) == pytest.approx(0, abs=1e-6), "a change of brightness"
    assert invention_loss(blob, target, torch.ones_like(mask)) == 0


def test_a_dark_exposure_counts_as_much_as_a_bright_one() -> None:
    output, target, mask = images()
    weights = {"defect": 0.2, "ssim": 0.2, "perceptual": 0, "edge": 0.2, "basic": 0.2, "charbonnier": 0.2}
    loss = build_loss(LossConfig.model_validate({"weights": weights}))
    bright = loss(Prediction(output), target, mask)
    dark = loss(Prediction(output / 4), target / 4, mask, scale=torch.full((2,), 4.0))
    assert dark["total"] == pytest.approx(bright["total"].item(), rel=1e-5)
