"""When a call is tried again: the policy alone, and as it shows in calls."""

import itertools
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx2
import pytest

from kintsugi_serve.client import Client, RetryBudget, ServiceError
from kintsugi_serve.client.retry import RetryPolicy, retry_after_s

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


class Clock:
    """Time that passes only by waiting, or as a server that takes its time says."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.seconds += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _answers(
    clock: Clock, *answers: httpx2.Response, takes: float = 0.0
) -> tuple[httpx2.MockTransport, list[httpx2.Request]]:
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        clock.seconds += takes
        return answers[min(len(asked), len(answers)) - 1]

    return httpx2.MockTransport(answer), asked


def _client(clock: Clock, transport: httpx2.MockTransport, **options: Any) -> Client:
    return Client("http://service", transport=transport, sleep=clock.sleep, clock=clock, **options)


def _busy(**headers: str) -> httpx2.Response:
    return httpx2.Response(503, text="busy", headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 0),
        ("7", 7),
        ("soon", 0),
        ("-3", 0),
        ("\u0663", 0),
        (format_datetime(NOW + timedelta(seconds=40), usegmt=True), 40),
        (format_datetime((NOW + timedelta(seconds=40)).replace(tzinfo=None)), 40),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str, seconds: float) -> None:
    assert retry_after_s(header, NOW.timestamp()) == seconds


def test_pauses_grow_at_random_below_a_bound() -> None:
    policy = RetryPolicy(retries=8, max_wait_s=2, budget=RetryBudget(reserve=1000, capacity=1000))
    rows = []
    for _ in range(100):
        tries = policy.begin()
        rows.append([tries.next_wait() for _ in range(9)])
    assert all(row[8] is None for row in rows)
    highest = [max(row[index] for row in rows) for index in range(8)]
    for index, seen in enumerate(highest):
        assert seen <= min(0.2 * 2**index, 2)
    assert highest[0] < highest[2] < highest[6]


def test_no_try_begins_after_the_deadline(clock: Clock) -> None:
    transport, asked = _answers(clock, _busy(Retry_After="3"))
    with pytest.raises(ServiceError) as caught:
        _client(clock, transport, retries=100).restore(b"image", deadline_s=10)
    assert caught.value.status == 503
    assert len(asked) >= 3 and clock.seconds < 10


def test_the_service_is_told_how_much_time_is_left(clock: Clock) -> None:
    transport, asked = _answers(clock, _busy(Retry_After="3"), takes=1)
    with pytest.raises(ServiceError):
        _client(clock, transport).restore(b"image", deadline_s=10)
    left = [float(request.headers["x-kintsugi-timeout"]) for request in asked]
    assert left[0] == 10 and all(after <= before - 4 for before, after in itertools.pairwise(left))
    limits = [request.extensions["timeout"]["read"] for request in asked]
    assert limits == pytest.approx(left, abs=0.001)


def test_without_time_nothing_is_sent(clock: Clock) -> None:
    transport, asked = _answers(clock, _busy())
    with pytest.raises(ServiceError) as caught:
        _client(clock, transport).restore(b"image", deadline_s=0)
    assert (caught.value.code, asked) == ("deadline_exceeded", [])


def test_a_date_in_retry_after_is_waited_for(clock: Clock) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    transport, _ = _answers(clock, _busy(Retry_After=later), httpx2.Response(200, json={"serving": {}}))
    _client(clock, transport, max_wait_s=300).models()
    assert 30 < clock.waits[0] < 61


def test_many_calls_into_an_outage_are_tried_again_only_now_and_then(clock: Clock) -> None:
    transport, asked = _answers(clock, _busy())
    client = _client(clock, transport)
    for _ in range(200):
        with pytest.raises(ServiceError):
            client.models()
    assert 200 < len(asked) <= 200 + 10 + 0.2 * 200


def test_a_retry_that_succeeds_costs_nothing(clock: Clock) -> None:
    transport, asked = _answers(clock, *[_busy(), httpx2.Response(200, json={})] * 200)
    client = _client(clock, transport)
    for _ in range(200):
        client.models()
    assert len(asked) == 400


def test_a_good_time_saves_up_no_more_than_the_budgets_capacity() -> None:
    budget = RetryBudget(ratio=0.5, reserve=2, capacity=20)
    for _ in range(1000):
        budget.call()
    assert sum(budget.take() for _ in range(100)) == 20


def test_clients_may_share_a_budget(clock: Clock) -> None:
    budget = RetryBudget(ratio=0, reserve=3)
    transport, asked = _answers(clock, _busy())
    for _ in range(4):
        with pytest.raises(ServiceError):
            _client(clock, transport, budget=budget).models()
    assert len(asked) == 4 + 3


def test_threads_take_no_token_twice() -> None:
    budget = RetryBudget(ratio=0, reserve=500, capacity=500)
    taken: list[bool] = []
    _together(8, lambda: taken.extend(budget.take() for _ in range(200)))
    assert sum(taken) == 500


def _together(count: int, work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("fault", [httpx2.UnsupportedProtocol("x"), httpx2.LocalProtocolError("x")])
def test_what_is_wrong_with_the_request_itself_is_not_tried_again(fault: Exception, clock: Clock) -> None:
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        raise fault

    with pytest.raises(ServiceError):
        _client(clock, httpx2.MockTransport(answer)).models()
    assert len(asked) == 1


def test_a_batch_is_looked_at_ever_more_seldom_until_it_ends(clock: Clock) -> None:
    running = [httpx2.Response(200, json={"id": "b", "status": "running", "done": done}) for done in range(20)]
    transport, asked = _answers(clock, *running, httpx2.Response(200, json={"id": "b", "status": "done", "done": 20}))
    seen: list[int] = []
    last = _client(clock, transport).wait_batch("b", progress=lambda found: seen.append(found["done"]))
    assert (last["status"], seen) == ("done", list(range(21)))
    assert clock.waits == sorted(clock.waits) and clock.waits[0] == 1 and clock.waits[-1] == 30
    assert {request.url.path for request in asked} == {"/v1/batches/b"}


def test_a_batch_that_outlasts_the_deadline_is_told(clock: Clock) -> None:
    transport, _ = _answers(clock, httpx2.Response(200, json={"id": "b", "status": "running"}))
    with pytest.raises(ServiceError, match="batch b still runs after 20 s") as caught:
        _client(clock, transport).wait_batch("b", deadline_s=20)
    assert caught.value.code == "deadline_exceeded" and clock.seconds < 20


def test_jobs_on_s3_send_only_what_is_given(clock: Clock) -> None:
    transport, asked = _answers(clock, httpx2.Response(200, json={"id": "b"}))
    client = _client(clock, transport)
    assert client.batch("s3://a/in/", "s3://a/out/", model="unet@3")["id"] == "b"
    client.restore_s3("s3://a/x.png", white_level=4095, deadline_s=9)
    assert [(request.url.path, request.read()) for request in asked] == [
        ("/v1/batches", b'{"input": "s3://a/in/", "output": "s3://a/out/", "model": "unet@3"}'),
        ("/v1/restore/s3", b'{"input": "s3://a/x.png", "white_level": 4095}'),
    ]
    assert float(asked[1].headers["x-kintsugi-timeout"]) == 9
    client.batch_progress("a/../b")
    assert asked[2].url.raw_path == b"/v1/batches/a%2F..%2Fb"
