"""The edge of the service: admission (key, size, request id), metrics, and every error as a problem."""

import asyncio
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kintsugi import errors
from kintsugi_serve.ingress.audit import audit_logger
from kintsugi_serve.ingress.callers import Caller, Callers
from kintsugi_serve.ingress.requests import budget_s
from kintsugi_serve.jobs import Answer, Serving
from kintsugi_serve.schemas import PROBLEMS, Problem, Refusal, Settings

logger = logging.getLogger(__name__)
GRACE_S = 5.0
_SHARES = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)
_BATCHES = (1, 2, 4, 8, 16, 32)

MAX_JSON_BYTES = 64 * 1024
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
RESTORE_PATHS = ("/v1/restore", "/v1/restore/s3")
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
    TimeoutError: "timeout",
    Exception: "internal",
}
_STATUS_CODES = {status: code for code, (status, _) in reversed(PROBLEMS.items())} | {422: "bad_request"}
_PRIVATE_DETAILS = {
    "internal": "something went wrong inside the service: report the request id to its operator",
    "store_failed": "the object store refused or holds damaged data: report the request id to the operator",
    "store_unavailable": "the object store did not answer: try again later",
    "timeout": "the request was not done in time: try again, or send smaller images",
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
        self.ongoing = Gauge("kintsugi_ongoing_requests", "Requests on their way", registry=self.registry)
        self.retention = Histogram(
            "kintsugi_retention", "Defect retention of answers", ("model",), buckets=_SHARES, registry=self.registry
        )
        self.stages = Histogram(
            "kintsugi_stage_seconds", "Decode, queue, model and encode of answers", ("stage",), registry=self.registry
        )
        self.batch = Histogram(
            "kintsugi_batch_images", "Images that passed together", buckets=_BATCHES, registry=self.registry
        )
        self.model = Gauge(
            "kintsugi_model_info", "1 for the model in service", ("model", "digest"), registry=self.registry
        )
        self.refused = Gauge(
            "kintsugi_model_refused", "1 while a version that should serve was refused", registry=self.registry
        )
        self.problems = Counter("kintsugi_problems", "Problems by code", ("route", "code"), registry=self.registry)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A series that begins with its first event hides that event from every rate over time."""
        for route in RESTORE_PATHS:
            self.requests.labels(route, "200")
            self.seconds.labels(route)
            for code in (code for code, (status, _) in PROBLEMS.items() if status >= 500):
                self.problems.labels(route, code)
        for stage in ("decode", "queue", "model", "encode"):
            self.stages.labels(stage)

    def restored(self, answer: Answer) -> None:
        model = answer.model.label
        self.retention.labels(model).observe(answer.retention)
        self.batch.observe(answer.batch)
        for stage, spent in answer.timing_ms.items():
            self.stages.labels(stage).observe(spent / 1000)
        if answer.alarm:
            self.alarms.labels(model).inc()

    def serving(self, serving: Serving) -> None:
        self.model.clear()
        self.model.labels(serving.version.label, serving.version.digest).set(1)
        self.refused.set(serving.refused is not None)
        self.alarms.labels(serving.version.label)
        self.retention.labels(serving.version.label)


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

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        proxy_echoes_id: bool = False,
        grace_s: float = GRACE_S,
    ) -> None:
        self.app = app
        self._settings = settings
        self._metrics = metrics
        self._proxy_echoes_id = proxy_echoes_id
        self._grace_s = grace_s
        self._callers = Callers(settings.keys, settings.roots)

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
        audit: dict[str, Any] = {}
        state = scope.setdefault("state", {})
        state.update(request_id=exchange.request_id, caller=Caller(""), audit=audit)
        receive, send = exchange.receiver(receive), exchange.sender(send)
        self._metrics.ongoing.inc()
        try:
            budget = budget_s(headers, self._settings.timeout_s)
            state["deadline"] = time.monotonic() + budget
            state["caller"] = self._admit(scope, headers, limit)
            # The work has its own end; this one is for bodies that do not arrive.
            async with asyncio.timeout(budget + self._grace_s):
                await self.app(scope, receive, send)
        except ClientDisconnect:
            exchange.status = exchange.status or 499
        except Exception as error:
            if exchange.status is not None:
                raise
            audit["code"] = code_of(error)
            await problem_of(error, exchange.request_id)(scope, receive, send)
        finally:
            self._metrics.ongoing.dec()
            self._record(scope, exchange)

    def _admit(self, scope: Scope, headers: Headers, limit: int) -> Caller:
        caller = Caller("")
        if scope["path"] not in OPEN_PATHS:
            if not self._settings.keys and not _is_local(scope):
                raise Refusal("forbidden", "this service knows no keys, so it answers its own machine only")
            caller = self._callers.admit(headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise Refusal("bad_request", "Content-Length must be a number")
        if int(length) > limit:
            raise Refusal("too_large", f"the body of {length} bytes is larger than {limit} bytes")
        return caller

    def _record(self, scope: Scope, exchange: Exchange) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        seconds = time.perf_counter() - exchange.started
        # Cancelled before an answer: the client is gone.
        status = exchange.status or 499
        self._metrics.requests.labels(route, str(status)).inc()
        if code := scope["state"]["audit"].get("code"):
            self._metrics.problems.labels(route, code).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        self._metrics.received.labels(route).inc(exchange.received)
        self._metrics.sent.labels(route).inc(exchange.sent)
        state = scope["state"]
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": exchange.request_id,
            "tenant": state["caller"].tenant,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "received": exchange.received,
            "sent": exchange.sent,
            **state["audit"],
        }
        audit_logger.info("%s", json.dumps(line))


def _is_local(scope: Scope) -> bool:
    """Whether the request comes from this machine, or from within the process."""
    try:
        return scope.get("client") is None or ipaddress.ip_address(scope["client"][0]).is_loopback
    except ValueError:  # no address: a client within the process
        return True


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
    if status in (429, 503):
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
        request.state.audit["code"] = code_of(error)
        response = problem_of(error, request.state.request_id)
        response.headers.update(headers)
        return response

    for kind in (HTTPException, RequestValidationError, errors.KintsugiError):
        app.add_exception_handler(kind, handle)
