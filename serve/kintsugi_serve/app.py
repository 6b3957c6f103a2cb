"""The Ray Serve application: a thin ingress and autoscaled replicas. Import path: `kintsugi_serve.app:build`."""

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from kintsugi import doors
from kintsugi.errors import KintsugiError, StoreUnavailable
from kintsugi.storage import open_store
from kintsugi_serve.batches.run import RunOptions
from kintsugi_serve.batches.service import RayBatchService
from kintsugi_serve.decoding.strips import Limits
from kintsugi_serve.ingress.api import build_api
from kintsugi_serve.ingress.audit import keep_audit
from kintsugi_serve.inner_port import keep_to_node
from kintsugi_serve.jobs import Answer, Job, LargeAnswer, LargeJob, LoadedModel, Rejection, Serving
from kintsugi_serve.replica.replica import Replica
from kintsugi_serve.schemas import Args, Refusal, Settings

logger = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 5.0
TRIES = 3
MOST_BACKOFF_S = 0.05
"""Between two looks for a replica with room. With Ray's 0.5 s replicas ran dry while requests waited."""
NODES = {"kintsugi.io/role": "!train"}
"""Replicas and ingress keep off nodes that are labelled for training. A node without the label takes them."""
MESSAGE_BYTES = 2**19
"""Up to here a job travels in a gRPC message; larger ones go by Ray's object store, and messages end at 4 MiB."""


class ReplicaBackend:
    """The replicas behind a Ray handle; what Ray raises becomes a Refusal with Retry-After.

    Ray Serve does not replay a request whose replica died. Restoring has no side effect, so another one tries, at
    most `TRIES` in all and within the request's budget.
    """

    def __init__(self, handle: DeploymentHandle[Replica], timeout_s: float) -> None:
        self._handle = handle
        self._by_store = handle.options(method_name="restore")
        self._by_message = handle.options(method_name="restore", _by_reference=False)
        self._large = handle.options(method_name="restore_large")
        self._timeout_s = timeout_s

    async def restore(self, job: Job) -> Answer | Rejection:
        handle = self._by_message if len(job.image) + len(job.mask or b"") <= MESSAGE_BYTES else self._by_store
        return await self._tried(handle, self._by_store, job)

    async def restore_large(self, job: LargeJob) -> LargeAnswer | Rejection:
        return await self._tried(self._large, self._large, job)

    async def _tried(self, handle: Any, again: Any, job: Job | LargeJob) -> Any:
        ends = time.monotonic() + job.budget_s
        for left_over in reversed(range(TRIES)):
            budget = max(ends - time.monotonic(), 0.001)
            asked = handle if job.model is None else handle.options(multiplexed_model_id=job.model)
            try:
                return await _result(asked.remote(replace(job, budget_s=budget)), budget)
            except Refusal as refusal:
                if refusal.code != "unavailable" or not left_over:
                    raise
                logger.warning("a replica went away while it worked: another one tries")
                # The answer may be what did not fit into a message (4 MiB, unless Ray's variables say otherwise).
                handle = again
        raise AssertionError("unreachable")

    async def describe(self) -> Serving:
        return await _result(self._handle.describe.remote(), DESCRIBE_TIMEOUT_S)

    async def resolve(self, model: str | None) -> LoadedModel:
        return await _result(self._handle.resolve.remote(model), DESCRIBE_TIMEOUT_S)

    async def published(self) -> list[dict[str, Any]]:
        return await _result(self._handle.published.remote(), self._timeout_s)


async def _result(response: Any, timeout_s: float) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            return await response
    except TimeoutError:
        response.cancel()
        raise Refusal("timeout", f"no answer within {timeout_s:g} s: try again, or send smaller images") from None
    except asyncio.CancelledError:
        response.cancel()
        raise
    except RayTaskError as error:
        if isinstance(error.cause, KintsugiError):
            raise error.cause from error
        raise
    except BackPressureError as error:
        raise Refusal("overloaded", f"{error.args[0]} requests wait already: try again later") from error
    except (RayActorError, RayServeException, AioRpcError) as error:
        raise Refusal("unavailable", "the replica went away while it worked: try again") from error


class Ingress:
    """Serves HTTP and holds no model."""

    def __init__(
        self, settings: Settings, replicas: DeploymentHandle[Replica], model: str, batches: RunOptions
    ) -> None:
        keep_to_node()
        self._settings = settings
        self._replicas = replicas
        self._model = model
        self._batches = batches

    def __serve_build_asgi_app__(self) -> FastAPI:
        backend = ReplicaBackend(self._replicas, self._settings.timeout_s)
        keep_audit(self._settings.audit_folder)
        batches = RayBatchService(self._settings.store, self._model, self._batches, self._resolve)
        return build_api(self._settings, backend, proxy_echoes_id=True, batches=batches)

    def _resolve(self, store: str, reference: str) -> LoadedModel:
        """A replica's work, since the registry takes torch."""
        response: Any = self._replicas.resolve.remote(reference)
        try:
            return response.result(timeout_s=DESCRIBE_TIMEOUT_S)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, KintsugiError) else error from error


def build(args: Args) -> serve.Application:
    """The application for `serve run`, `serve deploy`, a RayService and `kintsugi serve`: built once a deployment.

    Every replica follows an alias (`args.follow_s`), also those that are started later. To name another model, change
    the Replica deployment's `user_config`: replicas swap it in place.

    A store that does not answer now stops no deployment: replicas start from their cache, or try again.

    Raises:
        ModelNotFound: `args.model` names no published model.
        ConfigError, StoreError: a door of the store is open (`doors.check_store`).
    """
    from kintsugi.registry import Registry

    try:
        doors.check_store(args.store)
        Registry(open_store(args.store)).resolve(args.model)
    except StoreUnavailable as error:
        logger.warning("neither the store nor %s could be checked before they are served: %s", args.model, error)
    return bind(args)


def in_ray(replica_class: type[Replica]) -> type[Replica]:
    """The replica as Ray Serve starts it."""

    class InRay(replica_class):
        def __init__(self, settings: Settings) -> None:
            keep_to_node()
            super().__init__(settings)

    return InRay


def bind(args: Args, replica_class: type[Replica] = Replica) -> serve.Application:
    """Ingress and replicas with the options that `args` give them; `replica_class` may bring models of its own."""
    settings = args.settings()
    replicas = serve.deployment(
        name="Replica",
        user_config={"model": args.model},
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus, "label_selector": NODES},
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        request_router_config=RequestRouterConfig(max_backoff_s=MOST_BACKOFF_S),  # pyright: ignore[reportArgumentType]
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": args.target_ongoing_requests,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
        },
        max_surge_percent=100,
        max_constructor_retry_count=3,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=args.timeout_s,
        logging_config={"enable_access_log": False},
    )(in_ray(replica_class))
    streamed = Limits(args.max_streamed_pixels, args.max_streamed_bytes, args.decode_timeout_s)
    batches = RunOptions(args.max_replicas, args.num_cpus, args.num_gpus, args.threads, args.max_body_bytes, streamed)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": args.ingress_num_cpus, "label_selector": NODES},
        max_ongoing_requests=args.max_replicas * args.max_ongoing_requests + args.max_queued_requests + 16,
        max_queued_requests=args.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_surge_percent=100,
        graceful_shutdown_timeout_s=args.timeout_s,
        logging_config={"enable_access_log": False},
    )(serve.ingress()(Ingress))
    return ingress.bind(settings, replicas.bind(settings), args.model, batches)
