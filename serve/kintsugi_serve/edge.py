"""The edge of the service: admission (key, size, request id), metrics, and every error as a problem."""

import base64
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kintsugi import errors
from kintsugi_serve.schemas import PROBLEMS, Problem, Refusal, Settings

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 64 * 1024
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# The nearest class in the exception's ancestry decides; an ImageError and a Refusal carry their own code.
ERROR_CODES: dict[type[Exception], str] = {
    errors.ObjectNotFound: "not_found",
    errors.ModelNotFound: "not_found",
    errors.PreconditionFailed: "conflict",
    errors.StoreUnavailable: "store_unavailable",
    errors.StoreError: "store_failed",
    errors.IntegrityError: "store_failed",
    errors.KintsugiError: "internal",
    Exception: "internal",
}
_STATUS_CODES = {status: code for code, (status, _) in reversed(PROBLEMS.items())} | {422: "bad_request"}
_PRIVATE_DETAILS = {
    "internal": "something went wrong inside the service: report the request id to its operator",
    "store_failed": "the object store refused or holds damaged data: report the request id to the operator",
    "store_unavailable": "the object store did not answer: try again later",
}


class Metrics:
    """Counters of one ingress process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "status")
        self.requests = Counter("kintsugi_requests", "Requests answered", labels, registry=self.registry)
        self.seconds = Histogram(
            "kintsugi_request_seconds", "From first byte to last", ("route",), registry=self.registry
        )
        self.received = Counter("kintsugi_received_bytes", "Request bodies", ("route",), registry=self.registry)
        self.sent = Counter("kintsugi_sent_bytes", "Response bodies", ("route",), registry=self.registry)
        self.alarms = Counter("kintsugi_alarms", "Answers with the defect alarm", ("model",), registry=self.registry)


@dataclass
class Exchange:
    """One request on its way: counts bytes, stops a body that is too long, stamps the answer."""

    request_id: str
    limit: int
    stamps_id: bool = True
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None
    received: int = 0
    sent: int = 0

    def receiver(self, receive: Receive) -> Receive:
        async def counted() -> Message:
            message = await receive()
            self.received += len(message.get("body", b""))
            if self.received > self.limit:
                raise Refusal("too_large", f"the body is larger than {self.limit} bytes")
            return message

        return counted

    def sender(self, send: Send) -> Send:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                headers = MutableHeaders(scope=message)
                if self.stamps_id:
                    headers["X-Request-Id"] = self.request_id
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Cache-Control", "no-store")
            self.sent += len(message.get("body", b""))
            await send(message)

        return stamped


class Edge:
    """The outermost layer: request id, key, size limits, metrics, one log line, and no bare 500."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, proxy_echoes_id: bool = False) -> None:
        self.app = app
        self._settings = settings
        self._metrics = metrics
        self._proxy_echoes_id = proxy_echoes_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        limit = self._settings.max_body_bytes if scope["path"] == "/v1/restore" else MAX_JSON_BYTES
        harmless = _REQUEST_ID.fullmatch(given) is not None
        exchange = Exchange(
            given if harmless else str(uuid.uuid4()), limit, stamps_id=not (harmless and self._proxy_echoes_id)
        )
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        receive, send = exchange.receiver(receive), exchange.sender(send)
        try:
            self._admit(scope["path"], headers, limit)
            await self.app(scope, receive, send)
        except ClientDisconnect:
            exchange.status = exchange.status or 499
        except Exception as error:
            if exchange.status is not None:
                raise
            await problem_of(error, exchange.request_id)(scope, receive, send)
        finally:
            self._record(scope, exchange)

    def _admit(self, path: str, headers: Headers, limit: int) -> None:
        if path not in OPEN_PATHS and not key_is_known(headers, self._settings.api_key_sha256):
            raise Refusal("unauthorized", "send a known key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise Refusal("bad_request", "Content-Length must be a number")
        if int(length) > limit:
            raise Refusal("too_large", f"the body of {length} bytes is larger than {limit} bytes")

    def _record(self, scope: Scope, exchange: Exchange) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        seconds = time.perf_counter() - exchange.started
        # Cancelled before an answer: the client is gone.
        status = exchange.status or 499
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        self._metrics.received.labels(route).inc(exchange.received)
        self._metrics.sent.labels(route).inc(exchange.sent)
        logger.info(
            "request_id=%s method=%s route=%s status=%d seconds=%.3f received=%d sent=%d",
            *(exchange.request_id, scope["method"], route, status, seconds, exchange.received, exchange.sent),
        )


def key_is_known(headers: Mapping[str, str], hashes: tuple[str, ...]) -> bool:
    """Whether the request carries a key whose SHA-256 is among `hashes`; always, where there are none.

    The password of HTTP Basic counts as a key too: that is what a browser can ask a person for.
    """
    if not hashes:
        return True
    digest = hashlib.sha256(_given_key(headers).encode()).hexdigest()
    # A list, not a generator: every key is compared, so that the time tells nothing.
    return any([hmac.compare_digest(digest, known) for known in hashes])  # noqa: C419


def _given_key(headers: Mapping[str, str]) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return headers.get("x-api-key", "")


def code_of(error: Exception) -> str:
    """The stable code of any exception."""
    if isinstance(error, (Refusal, errors.ImageError)):
        return error.code
    return next(ERROR_CODES[ancestor] for ancestor in type(error).__mro__ if ancestor in ERROR_CODES)


def problem_of(error: Exception, request_id: str) -> Response:
    """The answer to an exception; what only the operator may know goes to the log instead."""
    code = code_of(error)
    status, title = PROBLEMS[code]
    detail = str(error)
    if not isinstance(error, Refusal) and code in _PRIVATE_DETAILS:
        logger.error("request_id=%s code=%s", request_id, code, exc_info=error)
        detail = _PRIVATE_DETAILS[code]
    headers: dict[str, str] = {}
    if status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="kintsugi", charset="UTF-8"'
    if status == 503:
        headers["Retry-After"] = str(getattr(error, "retry_after_s", None) or 1)
    problem = Problem(title=title, status=status, detail=detail, code=code, request_id=request_id)
    return Response(problem.model_dump_json(), status, headers, "application/problem+json")


def _refusal_from_http(error: HTTPException) -> Refusal:
    # FastAPI wraps what happens while it reads a JSON body.
    if isinstance(error.__cause__, Refusal):
        return error.__cause__
    code = _STATUS_CODES.get(error.status_code, "bad_request" if error.status_code < 500 else "internal")
    return Refusal(code, str(error.detail))


def _refusal_from_validation(error: RequestValidationError) -> Refusal:
    wrong = (f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
    return Refusal("bad_request", "; ".join(wrong))


def handle_errors(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        headers: Mapping[str, str] = {}
        if isinstance(error, HTTPException):
            headers = error.headers or {}
            error = _refusal_from_http(error)
        elif isinstance(error, RequestValidationError):
            error = _refusal_from_validation(error)
        response = problem_of(error, request.state.request_id)
        response.headers.update(headers)
        return response

    for kind in (HTTPException, RequestValidationError, errors.KintsugiError):
        app.add_exception_handler(kind, handle)
