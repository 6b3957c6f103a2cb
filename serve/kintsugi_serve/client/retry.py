"""Whether and when a call to the service is tried again. Decides only: sends nothing, and never sleeps itself."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime

from kintsugi.retry import pauses

FIRST_PAUSE_S = 0.2


class RetryBudget:
    """Bounds the retries of many calls together, so that an outage is not met with a multiple of the usual load.

    A bucket of tokens, as in gRPC's retry throttling (github.com/grpc/proposal, A6) and the AWS SDKs: a retry takes
    one, a call brings `ratio`, and a retry that succeeds gives its own back. Safe between threads; one
    budget may serve several clients.

    Args:
        ratio: of retries to calls, in the long run, while all retries fail.
        reserve: tokens at the start.
        capacity: tokens that a good time can save up for a bad one.
    """

    def __init__(self, ratio: float = 0.2, reserve: float = 10, capacity: float = 100) -> None:
        self._ratio = ratio
        self._tokens = float(reserve)
        self._capacity = max(capacity, reserve)
        self._lock = threading.Lock()

    def call(self) -> None:
        """A call begins."""
        self._add(self._ratio)

    def take(self) -> bool:
        """Whether one more retry is within the budget."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def give_back(self) -> None:
        """A retry succeeded."""
        self._add(1)

    def _add(self, tokens: float) -> None:
        with self._lock:
            self._tokens = min(self._capacity, self._tokens + tokens)


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and how long to wait before: exponential, with full jitter, and what the service asks for on top.

    Args:
        retries: of one call, beside its first try.
        max_wait_s: the longest pause, also where Retry-After asks for more.
        clock: seconds that never jump.
        wall_clock: seconds since 1970, for a Retry-After that is a date.
    """

    retries: int = 4
    max_wait_s: float = 10.0
    budget: RetryBudget = field(default_factory=RetryBudget)
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time

    def begin(self, deadline_s: float | None = None) -> "Tries":
        """The tries of one call, all of which end within `deadline_s` seconds from now."""
        return Tries(self, deadline_s)


class Tries:
    """The state of one call."""

    def __init__(self, policy: RetryPolicy, deadline_s: float | None) -> None:
        self._policy = policy
        self._ends = None if deadline_s is None else policy.clock() + deadline_s
        self._pauses = pauses(FIRST_PAUSE_S, policy.max_wait_s)
        self._retries = 0
        policy.budget.call()

    def left_s(self) -> float | None:
        """Seconds until the deadline; None where there is none."""
        return None if self._ends is None else self._ends - self._policy.clock()

    def next_wait(self, retry_after: str = "") -> float | None:
        """Seconds to wait before the next try; None where there is none: too many, too late, or over the budget."""
        policy = self._policy
        if self._retries >= policy.retries:
            return None
        asked = retry_after_s(retry_after, policy.wall_clock())
        # The jitter stays on top, so that clients that were refused together do not come back together.
        wait = min(asked + next(self._pauses), policy.max_wait_s)
        left = self.left_s()
        if (left is not None and wait >= left) or not policy.budget.take():
            return None
        self._retries += 1
        return wait

    def succeeded(self) -> None:
        """The last try was answered."""
        if self._retries:
            self._policy.budget.give_back()


def retry_after_s(header: str, now: float) -> float:
    """Seconds that a Retry-After header asks for, as a number or as an HTTP date; 0 for none or nonsense."""
    if header.isascii() and header.isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
