"""Make what a model pools over its whole input independent of how an image is cut.

Channel attention and GroupNorm take statistics over all that they are shown: on a tile they would differ from
those of the image, and tiles would disagree. Here the statistics are taken once for each image, on windows of fixed
size and place, averaged, and put in wherever a tile is restored (cf. "TLC", Chu et al., ECCV 2022, which pools
windows around each pixel).
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

Statistics = list[Tensor]
"""What each pooling module of a model saw, in the order of their calls."""

_exchange: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("exchange", default=None)


def watch(model: nn.Module) -> bool:
    """Prepare a model for `measure` and `fixed`; outside of them nothing changes.

    Returns:
        Whether it may pool over its whole input at all.
    """
    pools = False
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            hooks = module._forward_hooks  # pyright: ignore[reportPrivateUsage]
            _hook_once(module.register_forward_hook, hooks, _exchange_norm)
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            hooks = module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
            _hook_once(module.register_forward_pre_hook, hooks, _exchange_pooled)
        else:
            continue
        pools = True
    return pools


def measure(runs: Iterable[Callable[[], Any]]) -> Statistics:
    """The statistics of several passes of a watched model, averaged."""
    total: Statistics = []
    count = 0
    for run in runs:
        seen: Statistics = []
        with _exchanging(lambda value, seen=seen: _noted(seen, value)):
            run()
        total = [a + b for a, b in zip(total, seen, strict=True)] if total else seen
        count += 1
    return [value / count for value in total]


@contextmanager
def fixed(statistics: Statistics) -> Generator[None]:
    """One pass of a watched model with the given statistics in place of its input's own."""
    if not statistics:
        yield
        return
    values: Iterator[Tensor] = cycle(statistics)
    with _exchanging(lambda value: next(values)):
        yield


@contextmanager
def _exchanging(exchange: Callable[[Tensor], Tensor]) -> Generator[None]:
    token = _exchange.set(exchange)
    try:
        yield
    finally:
        _exchange.reset(token)


def _noted(seen: Statistics, value: Tensor) -> Tensor:
    seen.append(value)
    return value


def _hook_once(register: Callable[[Any], Any], hooks: dict[int, Any], hook: Callable[..., Any]) -> None:
    if hook not in hooks.values():
        register(hook)


def _exchange_pooled(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """A 1x1 convolution that meets a single position has been given what was pooled over the whole input."""
    exchange = _exchange.get()
    if exchange is None or inputs[0].shape[-2:] != (1, 1):
        return None
    return (exchange(inputs[0]),)


def _exchange_norm(module: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    exchange = _exchange.get()
    if exchange is None:
        return None
    grouped = inputs[0].unflatten(1, (module.num_groups, -1))
    own = torch.stack([grouped.mean((2, 3, 4)), grouped.square().mean((2, 3, 4))])
    mean, power = exchange(own)[..., None, None, None]
    normal = ((grouped - mean) * torch.rsqrt((power - mean.square()).clamp(min=0) + module.eps)).flatten(1, 2)
    return normal * module.weight[:, None, None] + module.bias[:, None, None] if module.affine else normal
