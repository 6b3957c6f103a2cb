"""Try again what may pass by itself."""

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def persist(
    work: Callable[[], T],
    passing: type[Exception],
    *,
    seconds: float,
    tries: int | None = None,
    first: float = 0.5,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """The result of `work`, begun anew after each `passing` error while there are `seconds` and `tries` left.

    Args:
        first: the longest that the first pause may take, in seconds.

    Raises:
        Exception: the last `passing` error, or at once any other.
    """
    started = clock()
    for done, pause in enumerate(pauses(first), start=1):
        try:
            return work()
        except passing:
            if done == tries or clock() - started + pause > seconds:
                raise
        sleep(pause)
    raise AssertionError("pauses never end")


def pauses(first: float, longest: float = 30.0) -> Iterator[float]:
    """Growing and at random, so that those who failed together do not come back together.

    "Full jitter" of https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """
    limit = first
    while True:
        yield random.uniform(0, limit)
        limit = min(2 * limit, longest)
