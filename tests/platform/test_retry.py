from itertools import islice

import pytest

from kintsugi.retry import pauses, persist


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def clock(self) -> float:
        return self.now


def test_work_is_begun_anew_until_it_succeeds() -> None:
    time, failures = Time(), [OSError("one"), OSError("two")]

    def work() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert persist(work, OSError, seconds=60, sleep=time.sleep, clock=time.clock) == "done"
    assert 0 < time.now < 60


def test_the_last_error_is_raised_within_the_time_that_was_given() -> None:
    time = Time()

    def work() -> None:
        raise OSError(f"at {time.now:.3f}")

    with pytest.raises(OSError, match="at") as caught:
        persist(work, OSError, seconds=100, sleep=time.sleep, clock=time.clock)
    assert 60 < time.now <= 100 and str(caught.value) == f"at {time.now:.3f}"


def test_the_number_of_tries_ends_it_too() -> None:
    time, tries = Time(), iter(range(9))
    with pytest.raises(OSError, match="try 2"):
        persist(lambda: _fail(next(tries)), OSError, seconds=1e9, tries=3, sleep=time.sleep, clock=time.clock)


def test_an_error_that_will_not_pass_is_raised_at_once() -> None:
    time = Time()
    with pytest.raises(ValueError, match="never"):
        persist(lambda: int("never"), OSError, seconds=60, sleep=time.sleep, clock=time.clock)
    assert time.now == 0


def test_pauses_grow_differ_and_stay_bounded() -> None:
    one, two = (list(islice(pauses(1.0, 30.0), 2000)) for _ in range(2))
    assert one != two
    assert all(0 <= pause <= min(2**i, 30) for i, pause in enumerate(one))
    late = one[5:]
    assert max(late) > 25 and min(late) < 5 and len(set(late)) > 1900


def _fail(number: int) -> None:
    raise OSError(f"try {number}")
