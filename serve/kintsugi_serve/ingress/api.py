"""The routes, over any backend: nothing here knows of Ray."""

import asyncio
import base64
import functools
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from kintsugi.storage import ObjectStore, open_store, sha256
from kintsugi_serve.decoding.strips import starts_as_tiff
from kintsugi_serve.ingress.batch_routes import BatchService, build_routes
from kintsugi_serve.ingress.crowd import Crowd
from kintsugi_serve.ingress.edge import Edge, Metrics, handle_errors
from kintsugi_serve.ingress.exposition import Exposition
from kintsugi_serve.ingress.openapi import PROBLEM_RESPONSES, RESTORE_ROUTE, S3_ROUTE
from kintsugi_serve.ingress.pages import page_route
from kintsugi_serve.ingress.requests import DefectMap, Embed, ModelName, Repeats, WhiteLevel, read_job
from kintsugi_serve.jobs import USE_A_BATCH, Answer, Backend, Job, LargeJob, LoadedModel, Rejection, Serving
from kintsugi_serve.objects.places import Places
from kintsugi_serve.objects.results import Results, StoredResult, result_facts, result_key
from kintsugi_serve.schemas import JsonResult, Refusal, S3Request, S3Result, Settings

READY_FOR_S = 10.0
_FACT_HEADERS = {
    "Model": "model",
    "Model-Digest": "digest",
    "Defect-Retention": "retention",
    "Alarm": "alarm",
    "Input-SHA256": "input_sha256",
    "Output-SHA256": "output_sha256",
}
Found = tuple[dict[str, Any], str, bool]
"""The facts of a result, where it is kept, and whether the request made anything."""
_AUDITED = ("model", "input_sha256", "output_sha256")


def answer_headers(answer: Answer) -> dict[str, str]:
    return {
        "X-Kintsugi-Model": answer.model.label,
        "X-Kintsugi-Model-Digest": answer.model.digest,
        "X-Kintsugi-Defect-Retention": f"{answer.retention:.4f}",
        "X-Kintsugi-Alarm": "true" if answer.alarm else "false",
        "X-Kintsugi-Input-SHA256": answer.input_sha256,
        "X-Kintsugi-Output-SHA256": answer.output_sha256,
        "Server-Timing": ", ".join(f"{name};dur={spent:.1f}" for name, spent in answer.timing_ms.items()),
    }


def build_api(
    settings: Settings,
    backend: Backend,
    *,
    open_root: Callable[[str], ObjectStore] = open_store,
    proxy_echoes_id: bool = False,
    batches: BatchService | None = None,
) -> FastAPI:
    """The service over any `backend`.

    Args:
        batches: who restores whole prefixes; None: nobody, and there are no routes for it.
        proxy_echoes_id: the proxy in front adds the request's own X-Request-Id to every answer, as Ray Serve's does.
    """
    metrics = Metrics()
    app = FastAPI(title="kintsugi", docs_url=None, redoc_url=None, responses=PROBLEM_RESPONSES)
    app.add_middleware(Edge, settings=settings, metrics=metrics, proxy_echoes_id=proxy_echoes_id)
    handle_errors(app)
    places = Places(settings.store, open_root, max_bytes=settings.max_body_bytes)
    results = functools.cache(lambda: Results(open_root(settings.store)))
    service = Service(settings, backend, metrics, places, results)
    exposition = Exposition(metrics.registry, service.described, lambda: open_root(settings.store))

    async def read_metrics() -> Response:
        return Response(await exposition.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.post("/v1/restore", response_class=Response, summary="Restore one image", **RESTORE_ROUTE)(service.restore)
    app.post("/v1/restore/s3", response_model=S3Result, summary="Restore from S3 to S3", **S3_ROUTE)(service.restore_s3)
    app.get("/v1/models", summary="The model in service, and all published ones")(service.models)
    app.get("/healthz", summary="Whether this process is alive")(service.healthz)
    app.get("/readyz", summary="Whether a replica holds a model")(service.readyz)
    app.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse)(read_metrics)
    if batches is not None:
        app.include_router(build_routes(batches, places.readable, places.writable))
    for path, name in (("/", "index.html"), ("/docs", "docs.html")):
        app.get(path, include_in_schema=False)(page_route(name))
    return app


class Service:
    """The routes."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        metrics: Metrics,
        places: Places,
        results: Callable[[], Results],
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._metrics = metrics
        self._places = places
        self._results = results
        self._repeats = Repeats()
        self._crowd = Crowd()
        self._answered: tuple[float, LoadedModel] | None = None

    async def restore(
        self,
        request: Request,
        white_level: WhiteLevel = None,
        model: ModelName = None,
        embed: Embed = False,
        defect_map: DefectMap = False,
    ) -> Response:
        as_json = "application/json" in request.headers.get("accept", "")
        asked = Job(b"", None, white_level, model, embed=embed, defect_map=defect_map and as_json)
        with self._crowd.entered():
            job = await read_job(request, asked)
            await self._repeats.check(request.state.caller.tenant, request.headers, job)
            answer = await self._restored(request, job)
        headers = answer_headers(answer)
        if not as_json:
            return Response(answer.image, headers=headers, media_type=f"image/{answer.format}")
        result = JsonResult(
            image=base64.b64encode(answer.image).decode(),
            format=answer.format,
            model=answer.model.label,
            digest=answer.model.digest,
            report=answer.report,
            input_sha256=answer.input_sha256,
            output_sha256=answer.output_sha256,
            timing_ms=answer.timing_ms,
            defect_map=base64.b64encode(answer.defect_map).decode() if answer.defect_map else None,
            request_id=request.state.request_id,
        )
        return Response(result.model_dump_json(), headers=headers, media_type="application/json")

    async def restore_s3(self, request: Request, response: Response, job: S3Request) -> S3Result:
        """From S3 to S3, or to where results are kept; the same question again gets the same result."""
        prefixes = request.state.caller.prefixes
        source = self._places.readable(job.input, prefixes)
        mask = self._places.readable(job.mask, prefixes) if job.mask is not None else None
        target = self._places.writable(job.output, prefixes) if job.output is not None else None
        asked = LargeJob(request.state.caller.tenant, source, mask, target, job.white_level, job.model)
        facts, result, created = await self._found(request, asked)
        response.headers.update({f"X-Kintsugi-{name}": facts[key] for name, key in _FACT_HEADERS.items()})
        return S3Result(
            output=target.uri if target else result,
            created=created,
            result=result,
            request_id=request.state.request_id,
            **{name: facts[name] for name in ("model", "digest", "report", "input_sha256", "output_sha256")},
        )

    async def _found(self, request: Request, asked: LargeJob) -> Found:
        """The image passes through this process if it can be held; else a replica takes it from the store itself."""
        places, target, image = self._places, asked.target, b""
        try:
            image = await asyncio.to_thread(places.read, asked.image)
            mask = await asyncio.to_thread(places.read, asked.mask) if asked.mask else None
            kept, created = await self._kept(request, Job(image, mask, asked.white_level, asked.model))
        except Refusal as refusal:
            if refusal.code != "too_large" or not self._settings.max_streamed_pixels:
                raise
            if image and not starts_as_tiff(image):
                raise Refusal("too_large", f"{refusal.detail}; as a TIFF it may be larger") from refusal
            return await self._found_large(request, asked)
        if target:
            created = await asyncio.to_thread(places.write_once, target, kept.image)
        return kept.facts, kept.uri, created

    async def _found_large(self, request: Request, asked: LargeJob) -> Found:
        left = max(request.state.deadline - time.monotonic(), 0.001)
        try:
            answer = await self._backend.restore_large(replace(asked, budget_s=left))
        except Refusal as refusal:
            if refusal.code != "timeout":
                raise
            raise Refusal("timeout", f"not restored within {left:g} s: {USE_A_BATCH}") from refusal
        if isinstance(answer, Rejection):
            raise Refusal(answer.code, answer.detail)
        if answer.answer is not None:
            self._metrics.restored(answer.answer)
        facts = answer.facts
        request.state.audit.update({name: facts[name] for name in _AUDITED}, repeated=answer.answer is None)
        return facts, answer.result, answer.created if answer.written is None else answer.written

    async def _kept(self, request: Request, job: Job) -> tuple[StoredResult, bool]:
        """The result under the address of its question, and whether it was made just now."""
        taken = await asyncio.to_thread(sha256, job.image)
        params = {"white_level": job.white_level, "mask": sha256(job.mask) if job.mask else None}

        def key_for(digest: str) -> str:
            return result_key(request.state.caller.tenant, taken, digest, params)

        version = await self._backend.resolve(job.model)
        found = await asyncio.to_thread(self._results().find, key_for(version.digest))
        if found is not None:
            request.state.audit.update({name: found.facts[name] for name in _AUDITED}, repeated=True)
            return found, False
        answer = await self._restored(request, job)
        facts = result_facts(answer)
        # By the version that answered: another one may have come into service meanwhile.
        return await asyncio.to_thread(self._results().keep, key_for(answer.model.digest), answer.image, facts)

    async def models(self) -> dict[str, Any]:
        serving = await self.described()
        return {**_as_json(serving), "published": await self._backend.published()}

    async def healthz(self) -> dict[str, str]:
        return {"status": "alive", "service": "kintsugi"}

    async def readyz(self) -> dict[str, Any]:
        """A replica that answered just now is ready, even if it is too busy to say so again."""
        seen = self._answered
        fresh = seen is not None and time.monotonic() - seen[0] < READY_FOR_S
        model = seen[1] if seen is not None and fresh else (await self.described()).version
        return {"status": "ready", "model": model.label, "digest": model.digest}

    async def _restored(self, request: Request, job: Job) -> Answer:
        left = request.state.deadline - time.monotonic()
        answer = await self._backend.restore(replace(job, budget_s=max(left, 0.001)))
        if isinstance(answer, Rejection):
            raise Refusal(answer.code, answer.detail)
        if job.model is None:
            self._answered = (time.monotonic(), answer.model)
        self._metrics.restored(answer)
        request.state.audit.update(
            model=answer.model.label,
            model_digest=answer.model.digest,
            input_sha256=answer.input_sha256,
            output_sha256=answer.output_sha256,
            retention=round(answer.retention, 6),
            alarm=answer.alarm,
        )
        return answer

    async def described(self) -> Serving:
        serving = await self._backend.describe()
        self._answered = (time.monotonic(), serving.version)
        self._metrics.serving(serving)
        return serving


def _as_json(serving: Serving) -> dict[str, Any]:
    version = serving.version
    return {
        "serving": {"name": version.name, "version": version.number, "digest": version.digest},
        "refused": asdict(serving.refused) if serving.refused else None,
    }
