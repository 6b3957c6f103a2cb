"""Requests on their way through one ingress, and the quick refusal of those for whom there is no room."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from kintsugi_serve.schemas import Refusal

SHUT_S = 1.0


class Crowd:
    """Refuses before a body is read what the replicas' queue would refuse after it.

    How many fit is learnt from the queue's own refusals, since replicas come and go: for `seconds` after one of them
    no more come in than were there beside it. Then the queue is asked again.
    """

    def __init__(self, seconds: float = SHUT_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._inside, self._most, self._until = 0, 0, float("-inf")

    @contextmanager
    def entered(self) -> Generator[None]:
        """One more request, if there is room.

        Raises:
            Refusal: `overloaded`.
        """
        if self._inside >= self._most and self._clock() < self._until:
            raise Refusal("overloaded", f"{self._inside} requests are on their way already: try again later")
        self._inside += 1
        try:
            yield
        except Refusal as refusal:
            if refusal.code == "overloaded":
                self._most, self._until = self._inside - 1, self._clock() + self._seconds
            raise
        finally:
            self._inside -= 1
