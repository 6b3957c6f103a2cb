"""The routes of batches, over any service: nothing here knows of Ray."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from fastapi import APIRouter, Request, Response

from kintsugi.errors import ConfigError, ObjectNotFound
from kintsugi_serve.batches.batch import BatchRequest, Progress
from kintsugi_serve.ingress.callers import Caller
from kintsugi_serve.schemas import Refusal

Check = Callable[[str, Iterable[str]], object]
"""Raises Refusal where an address (without a last slash) is not below one of the caller's prefixes."""


class BatchService(Protocol):
    """What the routes need of `kintsugi_serve.batches.service.RayBatchService`. Its work blocks."""

    def start(self, tenant: str, request: BatchRequest) -> Progress: ...

    def progress(self, tenant: str, id: str) -> Progress: ...

    def list(self, tenant: str) -> "list[Progress]": ...


def build_routes(service: BatchService, readable: Check, writable: Check) -> APIRouter:
    """The routes for an app whose errors `kintsugi_serve.ingress.edge.handle_errors` turns into problems.

    Who calls is `request.state.caller`.

    Args:
        readable: called with every input before anything is read.
        writable: called with every output.
    """
    router = APIRouter()

    @router.post("/v1/batches", status_code=202, summary="Restore every image under a prefix, or go on with it")
    async def start(request: Request, response: Response, job: BatchRequest) -> Progress:
        caller = _caller(request)
        readable(job.input.rstrip("/"), caller.prefixes)
        writable(job.output.rstrip("/"), caller.prefixes)
        try:
            progress = await asyncio.to_thread(service.start, caller.tenant, job)
        except ConfigError as error:
            raise Refusal("bad_request", str(error)) from error
        response.headers["Location"] = f"/v1/batches/{progress.id}"
        return progress

    @router.get("/v1/batches/{id}", summary="How far a batch is")
    async def show(request: Request, id: str) -> Progress:
        try:
            return await asyncio.to_thread(service.progress, _caller(request).tenant, id)
        except ObjectNotFound as error:
            raise Refusal("not_found", str(error)) from error

    @router.get("/v1/batches", summary="The newest batches")
    async def list_(request: Request) -> list[Progress]:
        return await asyncio.to_thread(service.list, _caller(request).tenant)

    return router


def _caller(request: Request) -> Caller:
    return request.state.caller
