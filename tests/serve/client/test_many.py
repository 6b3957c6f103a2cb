"""Many images at once, and the client for asyncio."""

import asyncio
import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kintsugi.errors import ConfigError, StoreError
from kintsugi_serve.client import AsyncClient, Client, Outcome, ServiceError

HEADERS = {
    "X-Kintsugi-Model": "unet@3",
    "X-Kintsugi-Model-Digest": "d",
    "X-Kintsugi-Defect-Retention": "0.9000",
    "X-Kintsugi-Alarm": "false",
}


def _echo(request: httpx2.Request) -> httpx2.Response:
    body = request.read()
    if body == b"bad":
        problem = {"code": "undecodable", "detail": "no image", "request_id": "r"}
        return httpx2.Response(422, json=problem, headers={"content-type": "application/problem+json"})
    return httpx2.Response(200, content=body, headers=HEADERS)


def _client(answer: Any = _echo, **options: Any) -> Client:
    return Client("http://service", transport=httpx2.MockTransport(answer), **options)


def _async_client(answer: Any = _echo, **options: Any) -> AsyncClient:
    return AsyncClient("http://service", transport=httpx2.MockTransport(answer), **options)


def _many(kind: str, sources: Any, **options: Any) -> list[Outcome]:
    """All outcomes, from the client of that kind."""
    if kind == "sync":
        return list(_client().restore_many(sources, **options))

    async def collect() -> list[Outcome]:
        async with _async_client() as client:
            return [outcome async for outcome in client.restore_many(sources, **options)]

    return asyncio.run(collect())


both = pytest.mark.parametrize("kind", ["sync", "async"])


@both
def test_one_bad_image_never_ends_the_many(kind: str, tmp_path: Path) -> None:
    sources = [b"a", b"bad", tmp_path / "none.png", b"d", (b"e", None)]
    outcomes = sorted(_many(kind, sources, concurrency=2), key=lambda outcome: outcome.index)
    assert [outcome.source for outcome in outcomes] == sources
    assert [outcome.image.data if outcome.image else None for outcome in outcomes] == [b"a", None, None, b"d", b"e"]
    refused, unread = outcomes[1].error, outcomes[2].error
    assert isinstance(refused, ServiceError) and refused.code == "undecodable"
    assert isinstance(unread, StoreError) and "none.png cannot be read" in str(unread)


@both
def test_progress_counts_what_is_done_of_what_is_known(kind: str) -> None:
    seen: list[tuple[int, int | None]] = []
    _many(kind, [b"a", b"bad", b"c"], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    _many(kind, iter([b"a"]), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, None)]
    assert _many(kind, []) == []


@both
@pytest.mark.parametrize("wrong", [{"sources": b"image"}, {"sources": "image.png"}, {"sources": [], "concurrency": 0}])
def test_what_are_not_many_is_refused_at_once(kind: str, wrong: dict[str, Any]) -> None:
    client = _client() if kind == "sync" else _async_client()
    with pytest.raises(ConfigError):
        client.restore_many(**wrong)


def _counted(taken: list[int], count: int) -> Iterator[bytes]:
    for index in range(count):
        taken.append(index)
        yield str(index).encode()


def test_sources_are_read_no_further_ahead_than_work_goes_on() -> None:
    taken: list[int] = []
    for done, _ in enumerate(_client().restore_many(_counted(taken, 50), concurrency=3), start=1):
        assert len(taken) - done <= 3
    assert len(taken) == 50


def test_sources_are_read_no_further_ahead_by_tasks_either() -> None:
    async def check() -> list[int]:
        taken: list[int] = []
        done = 0
        async for _ in _async_client().restore_many(_counted(taken, 50), concurrency=3):
            done += 1
            assert len(taken) - done <= 3
        return taken

    assert len(asyncio.run(check())) == 50


def test_as_many_as_asked_for_are_under_way_and_a_slow_one_holds_up_none() -> None:
    together, slow = threading.Barrier(3), threading.Event()

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = request.read()
        if body in (b"0", b"1", b"2"):
            together.wait(60)
        if body == b"0":
            assert slow.wait(60)
        return _echo(request)

    finished: list[int] = []
    for outcome in _client(answer).restore_many(_counted([], 10), concurrency=3):
        finished.append(outcome.index)
        if len(finished) == 9:
            slow.set()
    assert finished[-1] == 0 and sorted(finished) == list(range(10))


def test_tasks_run_together_and_those_of_a_loop_that_is_left_are_cancelled() -> None:
    async def leave() -> tuple[int, int]:
        cancelled: list[bytes] = []
        here = asyncio.Event()
        under_way = 0

        async def answer(request: httpx2.Request) -> httpx2.Response:
            nonlocal under_way
            body = await request.aread()
            if body == b"0":
                await here.wait()
                return _echo(request)
            under_way += 1
            if under_way == 3:
                here.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.append(body)
            raise AssertionError("an event that nobody sets")

        outcomes = _async_client(answer).restore_many(_counted([], 10), concurrency=4)
        first = await anext(outcomes)
        await outcomes.aclose()
        return first.index, len(cancelled)

    index, cancelled = asyncio.run(leave())
    assert index == 0 and cancelled >= 3


def test_a_loop_that_is_left_stops_reading() -> None:
    taken: list[int] = []
    outcomes = _client().restore_many(_counted(taken, 50), concurrency=2)
    next(outcomes)
    outcomes.close()
    assert len(taken) == 3


def test_a_failing_list_of_sources_is_not_hidden() -> None:
    def sources() -> Iterator[bytes]:
        yield b"a"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(_client().restore_many(sources(), concurrency=1))


def test_both_clients_offer_the_same() -> None:
    def calls(client: type) -> dict[str, inspect.Signature]:
        return {name: inspect.signature(f) for name, f in vars(client).items() if not name.startswith("_")}

    one, other = calls(Client), calls(AsyncClient)
    one["aclose"] = one.pop("close")
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].parameters == other[name].parameters, name
    options = [list(inspect.signature(client).parameters) for client in (Client, AsyncClient)]
    assert options[0] == options[1]


def test_every_call_works_as_a_coroutine(tmp_path: Path) -> None:
    asked: list[str] = []
    waits: list[float] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(f"{request.method} {request.url.path}")
        if len(asked) == 1:
            return httpx2.Response(503, text="busy", headers={"Retry-After": "2"})
        if request.url.path != "/v1/restore":
            return httpx2.Response(200, json={"id": "b", "status": "done"})
        return _echo(request)

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def go() -> None:
        (tmp_path / "a.png").write_bytes(b"a")
        async with _async_client(answer, sleep=sleep) as client:
            assert (await client.restore(tmp_path / "a.png", deadline_s=60)).data == b"a"
            assert (await client.batch("s3://a/in/", "s3://a/out/"))["id"] == "b"
            assert (await client.batch_progress("b"))["status"] == "done"
            assert (await client.wait_batch("b"))["status"] == "done"
            assert (await client.restore_s3("s3://a/in.png"))["id"] == "b"
            assert (await client.models())["id"] == "b"
            assert await client.ready()
            with pytest.raises(ServiceError, match="is this a kintsugi service"):
                await client.restore_with_report(b"a")

    asyncio.run(go())
    assert asked[:2] == ["POST /v1/restore"] * 2 and len(waits) == 1 and 2 <= waits[0] <= 2.2


def test_a_service_that_is_not_there_is_told_to_coroutines_too() -> None:
    async def refuse(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    async def go() -> None:
        async with _async_client(refuse, retries=1, max_wait_s=0) as client:
            assert not await client.ready()
            with pytest.raises(ServiceError, match="is the service running"):
                await client.restore(b"a")

    asyncio.run(go())
