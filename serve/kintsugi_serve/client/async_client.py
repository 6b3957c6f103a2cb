"""`AsyncClient`: the calls of `Client` as coroutines of asyncio."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from itertools import islice
from typing import Any, Self, TypeVar, Unpack

import httpx2

from kintsugi.errors import KintsugiError
from kintsugi_serve.client.calls import Call, Pause, Try, Work, calls_to, key_headers
from kintsugi_serve.client.retry import RetryBudget
from kintsugi_serve.client.values import (
    Mask,
    Outcome,
    RestoredImage,
    RestoreOptions,
    Source,
    several,
    size_of,
    split_pair,
)

T = TypeVar("T")


class AsyncClient:
    """As `Client`, for asyncio; every method means, takes and raises what its namesake there does.

    Files are read, and images in memory encoded, in a thread. `sleep` is awaited.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout: float = 90.0,
        *,
        retries: int = 4,
        max_wait_s: float = 10.0,
        budget: RetryBudget | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calls = calls_to(base_url, timeout, retries, max_wait_s, budget, clock)
        self._http = httpx2.AsyncClient(base_url=base_url, headers=key_headers(api_key), transport=transport)
        self._sleep = sleep

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def restore(
        self,
        source: Source,
        mask: Mask | None = None,
        *,
        white_level: int | None = None,
        model: str | None = None,
        embed: bool = False,
        deadline_s: float | None = None,
    ) -> RestoredImage:
        """As `Client.restore`."""
        options = RestoreOptions(white_level=white_level, model=model, embed=embed, deadline_s=deadline_s)
        return await self._run(self._calls.restore(source, mask, **options))

    async def restore_with_report(
        self, source: Source, mask: Mask | None = None, *, defect_map: bool = True, **options: Unpack[RestoreOptions]
    ) -> RestoredImage:
        """As `Client.restore_with_report`."""
        return await self._run(self._calls.restore(source, mask, report=True, defect_map=defect_map, **options))

    def restore_many(
        self,
        sources: Iterable[Source | tuple[Source, Mask | None]],
        *,
        concurrency: int = 4,
        progress: Callable[[int, int | None], None] | None = None,
        report: bool = False,
        defect_map: bool = False,
        **options: Unpack[RestoreOptions],
    ) -> AsyncIterator[Outcome]:
        """As `Client.restore_many`: `async for` over the outcomes, as they finish."""
        numbered = several(sources, concurrency)

        async def one(index: int, given: Source | tuple[Source, Mask | None]) -> Outcome:
            image, mask = split_pair(given)
            call = self._calls.restore(image, mask, report=report, defect_map=defect_map, **options)
            try:
                return Outcome(index, given, await self._run(call))
            except KintsugiError as error:
                return Outcome(index, given, error=error)

        async def outcomes() -> AsyncIterator[Outcome]:
            running: set[asyncio.Task[Outcome]] = set()
            finished: set[asyncio.Task[Outcome]] = set()
            count = 0
            # No TaskGroup: a generator that is left half-way may not yield from within one.
            try:
                running |= {asyncio.create_task(one(*job)) for job in islice(numbered, concurrency)}
                while running or finished:
                    if not finished:
                        finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    outcome = finished.pop().result()
                    room = concurrency - len(running) - len(finished)
                    running |= {asyncio.create_task(one(*job)) for job in islice(numbered, room)}
                    count += 1
                    if progress is not None:
                        progress(count, size_of(sources))
                    yield outcome
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

        return outcomes()

    async def restore_s3(
        self,
        input: str,
        output: str | None = None,
        mask: str | None = None,
        white_level: int | None = None,
        *,
        model: str | None = None,
        deadline_s: float | None = None,
    ) -> dict[str, Any]:
        """As `Client.restore_s3`."""
        job = {"input": input, "output": output, "mask": mask, "white_level": white_level, "model": model}
        return await self._run(self._calls.restore_s3(deadline_s, **job))

    async def batch(
        self, input: str, output: str, *, white_level: int | None = None, model: str | None = None
    ) -> dict[str, Any]:
        """As `Client.batch`."""
        return await self._run(self._calls.batch(input=input, output=output, white_level=white_level, model=model))

    async def batch_progress(self, batch_id: str) -> dict[str, Any]:
        """As `Client.batch_progress`."""
        return await self._run(self._calls.batch_progress(batch_id))

    async def wait_batch(
        self,
        batch_id: str,
        *,
        deadline_s: float | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """As `Client.wait_batch`."""
        return await self._run(self._calls.wait_batch(batch_id, deadline_s, progress))

    async def models(self) -> dict[str, Any]:
        """As `Client.models`."""
        return await self._run(self._calls.models())

    async def ready(self) -> bool:
        """As `Client.ready`."""
        return await self._run(self._calls.ready())

    async def _run(self, call: Call[T]) -> T:
        told: Any = None
        while True:
            try:
                step = call.send(told)
            except StopIteration as done:
                return done.value
            told = await self._take(step)

    async def _take(self, step: Work | Try | Pause) -> Any:
        if isinstance(step, Work):
            return await asyncio.to_thread(step.function)
        if isinstance(step, Pause):
            return await self._sleep(step.seconds)
        try:
            return await self._http.request(
                step.method,
                step.path,
                params=step.params,
                headers=step.headers,
                content=step.content,
                timeout=step.timeout,
            )
        except httpx2.RequestError as error:
            return error
