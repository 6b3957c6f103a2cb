"""What an answer of the service means: a result, or an error that may or may not pass. Sends nothing."""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from kintsugi_serve.client.values import Body, RestoredImage, ServiceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
Answer = httpx2.Response | httpx2.RequestError
"""What came back, or why nothing did."""

_RETRIED = frozenset({429, 503})
_RETRIED_IF_NOT_OURS = frozenset({500, 502, 504})
# Bytes were changed on their way back, or on their way there.
_DAMAGED = frozenset({"corrupted", "digest_mismatch"})
_OUR_FAULT = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)
_TIMING = re.compile(r"([\w-]+)\s*;\s*dur=(\d+(?:\.\d+)?)")


def result_of(answer: Answer, address: str, read: Callable[[httpx2.Response], T]) -> T:
    """What `read` makes of a good answer.

    Raises:
        ServiceError: the answer is a problem, is damaged, or does not come from a kintsugi service.
    """
    if isinstance(answer, httpx2.RequestError):
        reason = str(answer) or type(answer).__name__
        raise ServiceError("unreachable", 0, f"{address} did not answer ({reason}): is the service running?")
    if not answer.is_success:
        raise _error_of(answer)
    try:
        return read(answer)
    except (KeyError, TypeError) as error:
        detail = f"the answer lacks {error}: is this a kintsugi service?"
        raise ServiceError("unknown", answer.status_code, detail, _request_id(answer.headers)) from error
    except ValueError as error:
        raise _corrupted(f"the answer cannot be read ({error})", answer.headers) from error


def may_pass(answer: Answer, error: ServiceError) -> bool:
    """Whether another try may succeed."""
    if isinstance(answer, httpx2.RequestError):
        return not isinstance(answer, _OUR_FAULT)
    if error.code in _DAMAGED or answer.status_code in _RETRIED:
        return True
    return answer.status_code in _RETRIED_IF_NOT_OURS and not _is_problem(answer)


def read_file(sent: Body) -> Callable[[httpx2.Response], RestoredImage]:
    """Reads the answer that is an image file."""

    def read(answer: httpx2.Response) -> RestoredImage:
        headers = answer.headers
        retention = headers["x-kintsugi-defect-retention"]
        return RestoredImage(
            data=answer.content,
            model=headers["x-kintsugi-model"],
            digest=headers["x-kintsugi-model-digest"],
            retention=float(retention),
            alarm=headers["x-kintsugi-alarm"] == "true",
            request_id=_request_id(headers),
            input_sha256=_agreed(sent.input_sha256, headers.get("x-kintsugi-input-sha256"), headers),
            output_sha256=_agreed(_sha256(answer.content), headers.get("x-kintsugi-output-sha256"), headers),
            timing={stage: float(ms) for stage, ms in _TIMING.findall(headers.get("server-timing", ""))},
            white_level=sent.white_level,
        )

    return read


def read_json(sent: Body) -> Callable[[httpx2.Response], RestoredImage]:
    """Reads the answer that is a report with the image in it."""

    def read(answer: httpx2.Response) -> RestoredImage:
        found: dict[str, Any] = read_document(answer)
        data = base64.b64decode(found["image"], validate=True)
        report: dict[str, Any] = found["report"]
        return RestoredImage(
            data=data,
            model=found["model"],
            digest=found["digest"],
            retention=float(report["retention"]),
            alarm=bool(report["alarm"]),
            request_id=found["request_id"],
            input_sha256=_agreed(sent.input_sha256, found.get("input_sha256"), answer.headers),
            output_sha256=_agreed(_sha256(data), found.get("output_sha256"), answer.headers),
            timing=found.get("timing_ms") or {},
            white_level=sent.white_level,
            report=report,
            defect_map=_map_of(found.get("defect_map")),
        )

    return read


def read_document(answer: httpx2.Response) -> dict[str, Any]:
    """Reads an answer that is a JSON object."""
    if not answer.headers.get("content-type", "").startswith("application/json"):
        raise KeyError("JSON")
    return answer.json()


def _map_of(encoded: str | None) -> "NDArray[np.float32] | None":
    if encoded is None:
        return None
    import numpy as np

    from kintsugi import imaging
    from kintsugi.errors import ImageError

    try:
        pixels = imaging.decode(base64.b64decode(encoded, validate=True)).pixels
    except ImageError as error:
        raise binascii.Error(str(error)) from error
    return np.divide(pixels, np.float32(255), dtype=np.float32)


def _agreed(found: str, said: str | None, headers: Mapping[str, str]) -> str:
    """The digest, which the service, if it names one at all, must have found too."""
    if said is not None and said.lower() != found:
        raise _corrupted("bytes were changed between this client and the service", headers)
    return found


def _corrupted(what: str, headers: Mapping[str, str]) -> ServiceError:
    return ServiceError("corrupted", 200, f"{what}: try again, and check what lies in between", _request_id(headers))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _request_id(headers: Mapping[str, str]) -> str:
    # A proxy may have put its own beside the service's.
    return headers.get("x-request-id", "").partition(",")[0]


def _is_problem(answer: httpx2.Response) -> bool:
    return answer.headers.get("content-type", "").startswith("application/problem+json")


def _error_of(answer: httpx2.Response) -> ServiceError:
    request_id = _request_id(answer.headers)
    if _is_problem(answer):
        try:
            problem = answer.json()
            return ServiceError(problem["code"], answer.status_code, problem["detail"], request_id)
        except (ValueError, KeyError, TypeError):
            pass
    return ServiceError("unknown", answer.status_code, f"{answer.url} answered {answer.status_code}", request_id)
