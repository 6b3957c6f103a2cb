"""The routes, over any backend: nothing here knows of Ray."""

import asyncio
import base64
import hashlib
import importlib.resources
import itertools
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import UploadFile

from kintsugi import errors
from kintsugi.storage import ObjectStore, open_store
from kintsugi_serve.edge import Edge, Metrics, handle_errors
from kintsugi_serve.schemas import (
    Answer,
    Backend,
    Job,
    JsonResult,
    LoadedModel,
    Refusal,
    Rejection,
    S3Address,
    S3Request,
    S3Result,
    Settings,
    allowed_address,
    writable_address,
)

logger = logging.getLogger(__name__)

READY_FOR_S = 10.0
# curl --data-binary says x-www-form-urlencoded of everything; what the bytes are is decided by their magic number.
_RAW_TYPES = ("", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded")
# A part of a page, for example {{style.css}}.
_INLINED = re.compile(r"\{\{([a-z]+\.(?:css|js))\}\}")


class Places:
    """The objects that the S3 route may touch."""

    def __init__(self, settings: Settings, open_root: Callable[[str], ObjectStore]) -> None:
        self._settings = settings
        self._stores = {root.rstrip("/"): open_root(root.rstrip("/")) for root in settings.roots}

    def read(self, address: S3Address) -> bytes:
        """The object's bytes; its size is looked at first."""
        store, limit = self._stores[address.root], self._settings.max_body_bytes
        found = itertools.islice(store.list(address.key), 1000)
        size = next((info.size for info in found if info.key == address.key), None)
        if size is None:
            raise Refusal("not_found", f"there is no {address.root}/{address.key}")
        if size > limit:
            raise Refusal("too_large", f"{address.root}/{address.key} has {size} bytes, more than {limit}")
        return store.get(address.key)

    def write_once(self, address: S3Address, data: bytes) -> bool:
        """Whether the object is new; False where the same bytes were there. Never overwrites other bytes."""
        store = self._stores[address.root]
        try:
            store.put(address.key, data, if_none_match=True)
        except errors.PreconditionFailed:
            if store.get(address.key) == data:
                return False
            raise Refusal("conflict", f"{address.root}/{address.key} holds something else: choose another") from None
        return True


async def read_job(request: Request, white_level: int | None) -> Job:
    """The images of a raw or a multipart body.

    Raises:
        Refusal: `bad_request` for a body that lacks the image, `unsupported_format` for another content type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        if kind not in _RAW_TYPES and not kind.startswith("image/"):
            raise Refusal("unsupported_format", f"{kind} is not restored: send a PNG, TIFF, JPEG or BMP image")
        image = await request.body()
        if not image:
            raise Refusal("bad_request", "the body is empty: send the image in it")
        return Job(image, white_level=white_level)
    async with request.form(max_files=2, max_fields=2) as form:
        names = [name for name, _ in form.multi_items()]
        if sorted(names) not in (["image"], ["image", "mask"]):
            raise Refusal("bad_request", f"multipart needs one part 'image' and at most one 'mask' (got {names})")
        parts = {name: await part.read() for name, part in form.items() if isinstance(part, UploadFile)}
    if "image" not in parts or len(parts) != len(names):
        raise Refusal("bad_request", "'image' and 'mask' must be files: give each part a filename")
    return Job(parts["image"], parts.get("mask"), white_level)


def answer_headers(answer: Answer) -> dict[str, str]:
    return {
        "X-Kintsugi-Model": answer.model.label,
        "X-Kintsugi-Model-Digest": answer.model.digest,
        "X-Kintsugi-Defect-Retention": f"{answer.retention:.4f}",
        "X-Kintsugi-Alarm": "true" if answer.alarm else "false",
    }


def page(name: str) -> tuple[str, dict[str, str]]:
    """An HTML file of the package with its parts inlined, and headers that let only this inline code run."""
    folder = importlib.resources.files("kintsugi_serve") / "page"
    html = (folder / name).read_text(encoding="utf-8")
    html = _INLINED.sub(lambda part: (folder / part[1]).read_text(encoding="utf-8"), html)

    def allowed(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{value}'" for value in hashes)

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}


_PROBLEM_RESPONSE = {"description": "Problem (RFC 9457)", "content": {"application/problem+json": {}}}
_RESTORE_BODY: dict[str, Any] = {
    "required": True,
    "content": {kind: {} for kind in ("image/png", "image/tiff", "image/jpeg", "image/bmp", "application/octet-stream")}
    | {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {part: {"type": "string", "format": "binary"} for part in ("image", "mask")},
            }
        }
    },
}
_RESTORE_ANSWER: dict[str, Any] = {
    "description": "The image, restored, in the format it came in; or a report with it, if JSON is accepted",
    "model": JsonResult,
    "content": {"image/png": {}, "image/tiff": {}, "image/jpeg": {}, "image/bmp": {}},
}
_RESTORE_ROUTE: dict[str, Any] = {
    "responses": {200: _RESTORE_ANSWER},
    "openapi_extra": {"requestBody": _RESTORE_BODY},
}
WhiteLevel = Annotated[int | None, Query(description="value of full scale, for example 4095 for 12-bit cameras")]


def build_api(
    settings: Settings,
    backend: Backend,
    *,
    open_root: Callable[[str], ObjectStore] = open_store,
    proxy_echoes_id: bool = False,
) -> FastAPI:
    """The service over any `backend`.

    Args:
        proxy_echoes_id: the proxy in front adds the request's own X-Request-Id to every answer, as Ray Serve's does.
    """
    metrics = Metrics()
    app = FastAPI(title="kintsugi", docs_url=None, redoc_url=None, responses={"4XX": _PROBLEM_RESPONSE})
    app.add_middleware(Edge, settings=settings, metrics=metrics, proxy_echoes_id=proxy_echoes_id)
    handle_errors(app)
    service = Service(settings, backend, metrics, Places(settings, open_root))
    app.post("/v1/restore", response_class=Response, summary="Restore one image", **_RESTORE_ROUTE)(service.restore)
    app.post("/v1/restore/s3", response_model=S3Result, summary="Restore from S3 to S3")(service.restore_s3)
    app.get("/v1/models", summary="The model in service, and all published ones")(service.models)
    app.get("/healthz", summary="Whether this process is alive")(service.healthz)
    app.get("/readyz", summary="Whether a replica holds a model")(service.readyz)
    app.get("/metrics", summary="For Prometheus")(service.metrics)
    for path, name in (("/", "index.html"), ("/docs", "docs.html")):
        app.get(path, include_in_schema=False)(_page_route(name))
    return app


def _page_route(name: str) -> Callable[[], Awaitable[Response]]:
    html, headers = page(name)

    async def show() -> Response:
        return Response(html, headers=headers, media_type="text/html")

    return show


class Service:
    """The routes."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        metrics: Metrics,
        places: Places,
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._metrics = metrics
        self._places = places
        self._answered: tuple[float, LoadedModel] | None = None

    async def restore(self, request: Request, white_level: WhiteLevel = None) -> Response:
        answer = await self._restored(await read_job(request, white_level))
        headers = answer_headers(answer)
        if "application/json" not in request.headers.get("accept", ""):
            return Response(answer.image, headers=headers, media_type=f"image/{answer.format}")
        result = JsonResult(
            image=base64.b64encode(answer.image).decode(),
            format=answer.format,
            model=answer.model.label,
            digest=answer.model.digest,
            report=answer.report,
            request_id=request.state.request_id,
        )
        return Response(result.model_dump_json(), headers=headers, media_type="application/json")

    async def restore_s3(self, request: Request, response: Response, job: S3Request) -> S3Result:
        source = allowed_address(job.input, self._settings.roots)
        mask = allowed_address(job.mask, self._settings.roots) if job.mask is not None else None
        target = writable_address(job.output, self._settings)
        image = await asyncio.to_thread(self._places.read, source)
        mask_bytes = await asyncio.to_thread(self._places.read, mask) if mask else None
        answer = await self._restored(Job(image, mask_bytes, job.white_level))
        created = await asyncio.to_thread(self._places.write_once, target, answer.image)
        response.headers.update(answer_headers(answer))
        return S3Result(
            output=job.output,
            created=created,
            model=answer.model.label,
            digest=answer.model.digest,
            report=answer.report,
            request_id=request.state.request_id,
        )

    async def models(self) -> dict[str, Any]:
        loaded = await self._described()
        published = await self._backend.published()
        serving = {"name": loaded.name, "version": loaded.number, "digest": loaded.digest}
        return {"serving": serving, "published": published}

    async def healthz(self) -> dict[str, str]:
        return {"status": "alive", "service": "kintsugi"}

    async def readyz(self) -> dict[str, str]:
        """A replica that answered just now is ready, even if it is too busy to say so again."""
        seen = self._answered
        fresh = seen is not None and time.monotonic() - seen[0] < READY_FOR_S
        model = seen[1] if seen is not None and fresh else await self._described()
        return {"status": "ready", "model": model.label, "digest": model.digest}

    async def metrics(self) -> Response:
        return Response(generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _restored(self, job: Job) -> Answer:
        answer = await self._backend.restore(job)
        if isinstance(answer, Rejection):
            raise Refusal(answer.code, answer.detail)
        self._answered = (time.monotonic(), answer.model)
        if answer.alarm:
            self._metrics.alarms.labels(answer.model.label).inc()
        return answer

    async def _described(self) -> LoadedModel:
        model = await self._backend.describe()
        self._answered = (time.monotonic(), model)
        return model
