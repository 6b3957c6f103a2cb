import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kintsugi.models.attention import ChannelAttention
from kintsugi.restore.pooling import fixed, measure, watch

Model = Callable[[], nn.Module]
MODELS: dict[str, Model] = {
    "channel attention": lambda: ChannelAttention(8, 2),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "group norm without scales": lambda: nn.GroupNorm(2, 8, affine=False),
    "several": lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, padding=1), ChannelAttention(8, 2)),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    built = MODELS[request.param]()
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    assert watch(built)
    return built


def features(side: int = 12) -> Tensor:
    values = torch.rand(2, 8, side, side)
    values[..., side // 2 :] *= 3
    return values


@torch.no_grad()
def test_a_watched_model_is_unchanged(model: nn.Module) -> None:
    values = features()
    expected = model(values)
    watch(model)
    assert torch.equal(model(values), expected)
    measure([lambda: model(features())])
    assert torch.equal(model(values), expected)


@torch.no_grad()
def test_an_inputs_own_statistics_change_nothing(model: nn.Module) -> None:
    values = features()
    own = measure([lambda: model(values)])
    with fixed(own):
        torch.testing.assert_close(model(values), model(values))
    with fixed(own):
        held = model(values)
    torch.testing.assert_close(held, model(values), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_statistics_fixed_a_part_is_restored_as_in_the_whole(model: nn.Module) -> None:
    values = features()
    whole = measure([lambda: model(values)])
    with fixed(whole):
        part, expected = model(values[..., :6]), model(values)
    torch.testing.assert_close(part[..., :4], expected[..., :4])
    assert not torch.allclose(model(values[..., :6])[..., :4], expected[..., :4], atol=1e-3)


@torch.no_grad()
def test_statistics_are_the_mean_over_the_runs(model: nn.Module) -> None:
    first, second = features(), features()
    both = measure([lambda: model(first), lambda: model(second)])
    parts = zip(measure([lambda: model(first)]), measure([lambda: model(second)]), strict=True)
    for mean, (one, other) in zip(both, parts, strict=True):
        torch.testing.assert_close(mean, (one + other) / 2)


@torch.no_grad()
def test_another_thread_keeps_its_own_statistics(model: nn.Module) -> None:
    values, found = features(), list[Tensor]()
    expected = model(values)
    with fixed(measure([lambda: model(values * 5)])):
        other = threading.Thread(target=lambda: found.append(model(values).detach()))
        other.start()
        other.join()
    torch.testing.assert_close(found[0], expected)


def test_a_model_that_pools_nothing_is_not_watched() -> None:
    assert not watch(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()))
