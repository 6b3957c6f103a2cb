"""`Client`: the calls of a service, each waited for."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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


class Client:
    """Talks to one service; safe between threads.

    A restore has no side effect, so what may pass is tried again, at most `retries` times: no connection, a
    connection that broke, bytes that were damaged either way, 429, 503, and a 500, 502 or 504 that comes from a
    proxy in between. The pauses double, at random; `Retry-After` is honoured up to `max_wait_s`. All tries of a call
    carry one Idempotency-Key.

    Args:
        base_url: for example http://127.0.0.1:8000.
        timeout: seconds for one try, between two signs of life.
        budget: bounds the retries of all calls together; share one between clients of the same service.
        transport: for tests, for example `httpx2.MockTransport`; so are `sleep` and `clock`.

    Raises:
        ConfigError: `base_url` is no address, or no header can carry `api_key`.
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
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calls = calls_to(base_url, timeout, retries, max_wait_s, budget, clock)
        self._http = httpx2.Client(base_url=base_url, headers=key_headers(api_key), transport=transport)
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def restore(
        self,
        source: Source,
        mask: Mask | None = None,
        *,
        white_level: int | None = None,
        model: str | None = None,
        embed: bool = False,
        deadline_s: float | None = None,
    ) -> RestoredImage:
        """Restore a PNG, TIFF, JPEG or BMP: its bytes, its path, or a `kintsugi.imaging.Image`.

        Args:
            mask: known defects: an image in which every value but 0 is one, or (H, W) bool.
            white_level: value of full scale, for example 4095 for 12 bits in 16.
            model: NAME@NUMBER or NAME@ALIAS; by default the service's own.
            embed: write into the file (PNG or TIFF) by which model it was restored.
            deadline_s: for all tries together; the service stops working on the image when it has passed.

        Raises:
            ServiceError: with the problem's code, for example `undecodable` or `mask_required`.
            StoreError: a file cannot be read.
        """
        options = RestoreOptions(white_level=white_level, model=model, embed=embed, deadline_s=deadline_s)
        return self._run(self._calls.restore(source, mask, **options))

    def restore_with_report(
        self, source: Source, mask: Mask | None = None, *, defect_map: bool = True, **options: Unpack[RestoreOptions]
    ) -> RestoredImage:
        """As `restore`, with `report`, and with `defect_map` where the model predicts one."""
        return self._run(self._calls.restore(source, mask, report=True, defect_map=defect_map, **options))

    def restore_many(
        self,
        sources: Iterable[Source | tuple[Source, Mask | None]],
        *,
        concurrency: int = 4,
        progress: Callable[[int, int | None], None] | None = None,
        report: bool = False,
        defect_map: bool = False,
        **options: Unpack[RestoreOptions],
    ) -> Iterator[Outcome]:
        """Restore images, `concurrency` at a time, and yield them as they finish.

        Not in the order of `sources`, so that one which has to wait holds up none of the others; `Outcome.index` tells
        the place. An image that fails is an outcome with an `error`, and the others go on. At most `concurrency` + 1
        images are held at a time, so `sources` may be a generator of any length. Whoever leaves the loop early
        waits for those under way.

        Args:
            sources: images, or pairs of image and mask.
            progress: called with the number done and, where `sources` has a length, the number in all.
            report: as `restore_with_report`, with `defect_map` only where that is set too.

        Raises:
            ConfigError: `sources` is one image, or `concurrency` is below 1.
        """
        numbered = several(sources, concurrency)

        def one(index: int, given: Source | tuple[Source, Mask | None]) -> Outcome:
            image, mask = split_pair(given)
            call = self._calls.restore(image, mask, report=report, defect_map=defect_map, **options)
            try:
                return Outcome(index, given, self._run(call))
            except KintsugiError as error:
                return Outcome(index, given, error=error)

        def outcomes() -> Iterator[Outcome]:
            with ThreadPoolExecutor(concurrency) as pool:
                running: set[Future[Outcome]] = {pool.submit(one, *job) for job in islice(numbered, concurrency)}
                finished: set[Future[Outcome]] = set()
                count = 0
                while running or finished:
                    if not finished:
                        finished, running = wait(running, return_when=FIRST_COMPLETED)
                    outcome = finished.pop().result()
                    room = concurrency - len(running) - len(finished)
                    running |= {pool.submit(one, *job) for job in islice(numbered, room)}
                    count += 1
                    if progress is not None:
                        progress(count, size_of(sources))
                    yield outcome

        return outcomes()

    def restore_s3(
        self,
        input: str,
        output: str | None = None,
        mask: str | None = None,
        white_level: int | None = None,
        *,
        model: str | None = None,
        deadline_s: float | None = None,
    ) -> dict[str, Any]:
        """Restore `s3://` to `s3://`; the answer says whether the object is new, and holds the report.

        Args:
            output: without one the result stays where the service keeps it, at the answer's `result`.
        """
        job = {"input": input, "output": output, "mask": mask, "white_level": white_level, "model": model}
        return self._run(self._calls.restore_s3(deadline_s, **job))

    def batch(
        self, input: str, output: str, *, white_level: int | None = None, model: str | None = None
    ) -> dict[str, Any]:
        """Start to restore all images below one `s3://` prefix to another; the answer holds the batch's `id`."""
        return self._run(self._calls.batch(input=input, output=output, white_level=white_level, model=model))

    def batch_progress(self, batch_id: str) -> dict[str, Any]:
        """How far a batch is."""
        return self._run(self._calls.batch_progress(batch_id))

    def wait_batch(
        self,
        batch_id: str,
        *,
        deadline_s: float | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """The last progress of a batch, once it no longer runs; looks after 1 s, then ever more seldom.

        Raises:
            ServiceError: `deadline_exceeded` where it still runs after `deadline_s`; it goes on.
        """
        return self._run(self._calls.wait_batch(batch_id, deadline_s, progress))

    def models(self) -> dict[str, Any]:
        """The model in service and all published ones."""
        return self._run(self._calls.models())

    def ready(self) -> bool:
        """Whether a replica holds a model; asks once."""
        return self._run(self._calls.ready())

    def _run(self, call: Call[T]) -> T:
        told: Any = None
        while True:
            try:
                step = call.send(told)
            except StopIteration as done:
                return done.value
            told = self._take(step)

    def _take(self, step: Work | Try | Pause) -> Any:
        if isinstance(step, Work):
            return step.function()
        if isinstance(step, Pause):
            return self._sleep(step.seconds)
        try:
            return self._http.request(
                step.method,
                step.path,
                params=step.params,
                headers=step.headers,
                content=step.content,
                timeout=step.timeout,
            )
        except httpx2.RequestError as error:
            return error
