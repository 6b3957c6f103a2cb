import pytest
import torch

from kintsugi.config import LossConfig
from kintsugi.losses import build_loss, defect_loss, edge_loss, ssim_loss


def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 10:14, 10:14] = 1
    return torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32), mask


def test_total_is_the_weighted_sum_of_the_parts() -> None:
    output, target, mask = images()
    config = LossConfig()
    terms = build_loss(config, lambda a, b: (a - b).square().mean())(output, target, mask)
    expected = sum(weight * terms[name] for name, weight in config.weights.model_dump().items())
    assert torch.allclose(terms["total"], expected)
    assert set(terms) == {"defect", "ssim", "perceptual", "edge", "basic", "total"}


def test_a_perfect_output_costs_nothing() -> None:
    _, target, mask = images()
    terms = build_loss(LossConfig(), lambda a, b: (a - b).abs().mean())(target, target, mask)
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
    terms = build_loss(LossConfig.model_validate({"weights": weights}), None)(*images())
    assert set(terms) == {"defect", "ssim", "total"}
