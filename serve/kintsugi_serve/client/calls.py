"""The client's calls without any input or output: each is a generator of steps that `Client` or `AsyncClient` take.

A step is work that blocks, a try over HTTP, or a pause; its result is sent back into the generator.
"""

import json
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2

from kintsugi.errors import ConfigError
from kintsugi_serve.client.answers import Answer, may_pass, read_document, read_file, read_json, result_of
from kintsugi_serve.client.retry import RetryBudget, RetryPolicy, Tries
from kintsugi_serve.client.values import Body, Mask, RestoredImage, ServiceError, Source, image_body

T = TypeVar("T")
_RUNNING = frozenset({"queued", "pending", "running"})
_FIRST_LOOK_S, _LONGEST_LOOK_S = 1.0, 30.0


@dataclass(frozen=True)
class Work:
    """Call this; it reads files or computes, and may block."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Try:
    """Send this once; answer with the response, or with the `httpx2.RequestError` that came instead."""

    method: str
    path: str
    params: Mapping[str, str | int] = field(default_factory=dict[str, str | int])
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    content: bytes | None = None
    timeout: float = 90.0


@dataclass(frozen=True)
class Pause:
    """Wait for this long."""

    seconds: float


Call = Generator[Work | Try | Pause, Any, T]


@dataclass(frozen=True)
class Asked:
    """A request, the same over all its tries."""

    method: str
    path: str
    params: Mapping[str, str | int] = field(default_factory=dict[str, str | int])
    body: Body | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


class Calls:
    """Every call to one service.

    Args:
        address: of the service, for messages.
        timeout: seconds for one try.
    """

    def __init__(self, address: str, policy: RetryPolicy, timeout: float) -> None:
        self._address = address
        self._policy = policy
        self._timeout = timeout

    def restore(
        self,
        source: Source,
        mask: Mask | None = None,
        *,
        white_level: int | None = None,
        model: str | None = None,
        embed: bool = False,
        deadline_s: float | None = None,
        report: bool = False,
        defect_map: bool = False,
    ) -> Call[RestoredImage]:
        """One image; as JSON where the report is wanted."""
        tries = self._policy.begin(deadline_s)
        body: Body = yield Work(partial(image_body, source, mask, white_level))
        wanted = {"white_level": body.white_level, "model": model, "embed": embed, "defect_map": defect_map}
        # Only what is asked for, since an older service may not know of it.
        given = {name: value for name, value in wanted.items() if value is not None and value is not False}
        params = {name: "true" if value is True else value for name, value in given.items()}
        headers = {"Accept": "application/json"} if report else {}
        asked = Asked("POST", "v1/restore", params, body, headers)
        return (yield from self._tried(asked, (read_json if report else read_file)(body), tries))

    def restore_s3(self, deadline_s: float | None, **job: str | int | None) -> Call[dict[str, Any]]:
        return self._posted("v1/restore/s3", job, deadline_s)

    def batch(self, **job: str | int | None) -> Call[dict[str, Any]]:
        return self._posted("v1/batches", job)

    def batch_progress(self, batch_id: str) -> Call[dict[str, Any]]:
        asked = Asked("GET", f"v1/batches/{quote(batch_id, safe='')}")
        return self._tried(asked, read_document, self._policy.begin())

    def wait_batch(
        self, batch_id: str, deadline_s: float | None, progress: Callable[[dict[str, Any]], None] | None
    ) -> Call[dict[str, Any]]:
        """Look until the batch no longer runs; ever more seldom."""
        clock, pause = self._policy.clock, _FIRST_LOOK_S
        ends = None if deadline_s is None else clock() + deadline_s
        while True:
            found = yield from self.batch_progress(batch_id)
            if progress is not None:
                progress(found)
            if found.get("status") not in _RUNNING:
                return found
            if ends is not None and clock() + pause >= ends:
                raise ServiceError(
                    "deadline_exceeded", 0, f"batch {batch_id} still runs after {deadline_s:g} s: wait for it again"
                )
            yield Pause(pause)
            pause = min(1.5 * pause, _LONGEST_LOOK_S)

    def models(self) -> Call[dict[str, Any]]:
        return self._tried(Asked("GET", "v1/models"), read_document, self._policy.begin())

    def ready(self) -> Call[bool]:
        """Asks once."""
        answer: Answer = yield Try("GET", "readyz", timeout=self._timeout)
        return isinstance(answer, httpx2.Response) and answer.status_code == 200

    def _posted(
        self, path: str, document: Mapping[str, str | int | None], deadline_s: float | None = None
    ) -> Call[dict[str, Any]]:
        given = {name: value for name, value in document.items() if value is not None}
        body = Body(json.dumps(given).encode(), "application/json")
        return self._tried(Asked("POST", path, body=body), read_document, self._policy.begin(deadline_s))

    def _tried(self, asked: Asked, read: Callable[[httpx2.Response], T], tries: Tries) -> Call[T]:
        headers = dict(asked.headers)
        if asked.body is not None:
            headers |= {**asked.body.headers(), "Idempotency-Key": uuid.uuid4().hex}
        while True:
            answer: Answer = yield self._try(asked, headers, tries.left_s())
            try:
                result = result_of(answer, self._address, read)
            except ServiceError as error:
                wait = tries.next_wait(_retry_after(answer)) if may_pass(answer, error) else None
                if wait is None:
                    raise
                yield Pause(wait)
            else:
                tries.succeeded()
                return result

    def _try(self, asked: Asked, headers: Mapping[str, str], left_s: float | None) -> Try:
        timeout = self._timeout
        if left_s is not None:
            if left_s <= 0:
                raise ServiceError("deadline_exceeded", 0, "no time was left to send the request: give it more")
            headers = {**headers, "X-Kintsugi-Timeout": f"{max(left_s, 0.001):.3f}"}
            timeout = min(timeout, left_s)
        content = None if asked.body is None else asked.body.content
        return Try(asked.method, asked.path, asked.params, headers, content, timeout)


def calls_to(
    base_url: str,
    timeout: float,
    retries: int,
    max_wait_s: float,
    budget: RetryBudget | None,
    clock: Callable[[], float],
) -> Calls:
    """The calls to the service at `base_url`.

    Raises:
        ConfigError: it is no address.
    """
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{base_url!r} is not the address of a service: write it as http://host:8000")
    # A password in the address must not get into messages.
    address = str(url.copy_with(username=None, password=None))
    return Calls(address, RetryPolicy(retries, max_wait_s, budget or RetryBudget(), clock), timeout)


def key_headers(api_key: str | None) -> dict[str, str]:
    """The key as a header.

    Raises:
        ConfigError: a header cannot carry it.
    """
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("the API key holds characters that no header carries: check where it was copied from")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _retry_after(answer: Answer) -> str:
    return answer.headers.get("retry-after", "") if isinstance(answer, httpx2.Response) else ""
