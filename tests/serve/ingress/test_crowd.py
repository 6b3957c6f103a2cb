from contextlib import ExitStack

import pytest

from kintsugi_serve.ingress.crowd import Crowd
from kintsugi_serve.schemas import Refusal


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def refuse(crowd: Crowd) -> None:
    """One that came in and found the queue full."""
    with pytest.raises(Refusal, match="queue"), crowd.entered():
        raise Refusal("overloaded", "the queue is full")


def test_everybody_comes_in_until_the_queue_refuses_somebody() -> None:
    crowd = Crowd()
    with ExitStack() as inside:
        for _ in range(100):
            inside.enter_context(crowd.entered())


def test_while_the_queue_is_full_nobody_more_comes_in_and_one_more_for_each_that_leaves() -> None:
    crowd = Crowd(clock=Clock())
    with ExitStack() as others:
        others.enter_context(crowd.entered())
        with crowd.entered():
            refuse(crowd)
            with pytest.raises(Refusal, match="2 requests") as refusal, crowd.entered():
                raise AssertionError("it came in")
        assert refusal.value.code == "overloaded"
        with crowd.entered(), pytest.raises(Refusal, match="on their way"), crowd.entered():
            raise AssertionError("it came in")


def test_the_queue_is_asked_again_after_a_while() -> None:
    clock = Clock()
    crowd = Crowd(seconds=1.0, clock=clock)
    with crowd.entered():
        refuse(crowd)
        clock.now += 1.0
        with crowd.entered():
            pass


def test_other_refusals_close_nothing() -> None:
    crowd = Crowd()
    with pytest.raises(Refusal), crowd.entered():
        raise Refusal("timeout", "too late")
    with crowd.entered(), crowd.entered():
        pass
