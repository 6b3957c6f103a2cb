"""Client of the service, for programs on the line."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx2

from kintsugi.errors import KintsugiError

_RETRIED = frozenset({429, 503})
_RETRIED_IF_NOT_OURS = frozenset({500, 502, 504})
_BODY_TYPE = {"Content-Type": "application/octet-stream"}


class ServiceError(KintsugiError):
    """The service answered with a problem, or not at all (`code` is `unreachable`, `status` is 0)."""

    def __init__(self, code: str, status: int, detail: str, request_id: str = "") -> None:
        super().__init__(detail)
        self.code = code
        self.status = status
        self.request_id = request_id


@dataclass(frozen=True)
class RestoredImage:
    """The restored file, in the format that was sent, and what the service said of it."""

    data: bytes
    model: str
    digest: str
    retention: float
    alarm: bool
    request_id: str


class Client:
    """Talks to one service. A restore has no side effect, so what may pass is tried again.

    Tried again, at most `retries` times: no connection, 429, 503, and a 500, 502 or 504 that comes from a
    proxy in between. `Retry-After` is honoured up to `max_wait_s`.

    Args:
        timeout: seconds for one try.
        transport: for tests, for example `httpx2.MockTransport`.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout: float = 90.0,
        *,
        retries: int = 4,
        max_wait_s: float = 10.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.Client(base_url=base_url, headers=headers, timeout=timeout, transport=transport)
        self._retries = retries
        self._max_wait_s = max_wait_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def restore(self, image: bytes, mask: bytes | None = None, white_level: int | None = None) -> RestoredImage:
        """Restore the bytes of a PNG, TIFF, JPEG or BMP file.

        Raises:
            ServiceError: with the problem's code, for example `undecodable` or `mask_required`.
        """
        params = {} if white_level is None else {"white_level": white_level}
        if mask is None:
            answer = self._send("POST", "/v1/restore", params=params, content=image, headers=_BODY_TYPE)
        else:
            files = {"image": ("image", image), "mask": ("mask", mask)}
            answer = self._send("POST", "/v1/restore", params=params, files=files)
        return _restored(answer.content, answer.headers)

    def restore_s3(
        self, input: str, output: str, mask: str | None = None, white_level: int | None = None
    ) -> dict[str, Any]:
        """Restore `s3://` to `s3://`; the answer says whether the object is new, and holds the report."""
        job = {"input": input, "output": output, "mask": mask, "white_level": white_level}
        return self._send("POST", "/v1/restore/s3", json=job).json()

    def models(self) -> dict[str, Any]:
        """The model in service and all published ones."""
        return self._send("GET", "/v1/models").json()

    def ready(self) -> bool:
        """Whether a replica holds a model; asks once."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def _send(self, method: str, path: str, **request: Any) -> httpx2.Response:
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            try:
                answer = self._http.request(method, path, **request)
            except httpx2.TransportError as error:
                if last:
                    raise ServiceError(
                        "unreachable", 0, f"{self._http.base_url} did not answer ({error}): is the service running?"
                    ) from error
                self._wait(attempt, {})
                continue
            if answer.is_success:
                return answer
            if last or not _may_pass(answer):
                raise _error_of(answer)
            self._wait(attempt, answer.headers)
        raise AssertionError("unreachable")

    def _wait(self, attempt: int, headers: Mapping[str, str]) -> None:
        asked = headers.get("retry-after", "")
        # Full jitter, so that clients that were refused together do not come back together.
        wait = random.uniform(0, 0.2 * 2**attempt) + (int(asked) if asked.isdecimal() else 0)
        time.sleep(min(wait, self._max_wait_s))


def _request_id(headers: Mapping[str, str]) -> str:
    # A proxy may have put its own beside the service's.
    return headers.get("x-request-id", "").partition(",")[0]


def _is_problem(answer: httpx2.Response) -> bool:
    return answer.headers.get("content-type", "").startswith("application/problem+json")


def _may_pass(answer: httpx2.Response) -> bool:
    return answer.status_code in _RETRIED or (answer.status_code in _RETRIED_IF_NOT_OURS and not _is_problem(answer))


def _error_of(answer: httpx2.Response) -> ServiceError:
    request_id = _request_id(answer.headers)
    if not _is_problem(answer):
        return ServiceError("unknown", answer.status_code, f"{answer.url} answered {answer.status_code}", request_id)
    problem = answer.json()
    return ServiceError(problem["code"], answer.status_code, problem["detail"], request_id)


def _restored(data: bytes, headers: Mapping[str, str]) -> RestoredImage:
    try:
        return RestoredImage(
            data,
            headers["x-kintsugi-model"],
            headers["x-kintsugi-model-digest"],
            float(headers["x-kintsugi-defect-retention"]),
            headers["x-kintsugi-alarm"] == "true",
            _request_id(headers),
        )
    except KeyError as error:
        raise ServiceError("unknown", 200, f"the answer lacks {error}: is this a kintsugi service?") from error
