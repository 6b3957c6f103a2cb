"""Replica: decodes, restores in batches with the model in service, and encodes in kind."""

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kintsugi import imaging
from kintsugi.errors import (
    Abandoned,
    ConfigError,
    ImageError,
    IntegrityError,
    KintsugiError,
    ModelNotFound,
    StoreError,
    StoreUnavailable,
)
from kintsugi.storage import ObjectStore, cache_folder, open_store
from kintsugi_serve.decoding.codec import Decoder
from kintsugi_serve.decoding.strips import Limits
from kintsugi_serve.jobs import USE_A_BATCH, Answer, Job, LargeAnswer, LargeJob, LoadedModel, Rejection, Serving
from kintsugi_serve.replica.large import LargeImages, Turn
from kintsugi_serve.replica.serving import (
    InService,
    Loaded,
    Others,
    Published,
    Shelving,
    Source,
    list_published,
    ray_shelving,
)
from kintsugi_serve.schemas import Refusal, Settings
from kintsugi_serve.traces import tell_stages

if TYPE_CHECKING:
    from kintsugi.restore.restorer import Restoration

logger = logging.getLogger(__name__)

_CODES: dict[type[KintsugiError], str] = {
    ModelNotFound: "not_found",
    ConfigError: "bad_request",
    StoreUnavailable: "store_unavailable",
    StoreError: "store_failed",
    IntegrityError: "store_failed",
}


@dataclass
class Decoded:
    """An image on its way; `waiting` ends when nobody asks for it any more."""

    image: imaging.Image
    mask: NDArray[np.bool_] | None
    loaded: Loaded
    decode_ms: float = 0.0
    waiting: bool = True
    since: float = field(default_factory=time.perf_counter)

    @property
    def pixels(self) -> int:
        height, width = self.image.size
        return height * width


@dataclass(frozen=True)
class Inferred:
    """What the model said of one image, how long that took, and how many images passed with it."""

    result: "Restoration | KintsugiError"
    queue_ms: float = 0.0
    model_ms: float = 0.0
    batch: int = 1


Infer = Callable[[list[Decoded]], Awaitable[list[Inferred]]]
Batching = Callable[[Infer], Callable[[Decoded], Awaitable[Inferred]]]


class Decoding(Protocol):
    """What a replica needs of `codec.Decoder`."""

    async def decode(
        self, image: bytes, mask: bytes | None = None, *, white_level: int | None = None, max_pixels: int
    ) -> tuple[imaging.Image, NDArray[np.bool_] | None]: ...


def decoder_of(settings: Settings) -> Decoder:
    """Children that decode; what they make of images that end them is remembered for all replicas of the machine."""
    return Decoder(settings.decoders, timeout_s=settings.decode_timeout_s, ledger=cache_folder() / "refused-images")


def batching_of(settings: Settings) -> Batching:
    """Batches by pixels on an accelerator; on a CPU a batch would take as long as its images one after another."""
    return in_turn if settings.device == "cpu" else ray_batching(settings)


def in_turn(infer: Infer) -> Callable[[Decoded], Awaitable[Inferred]]:
    """One image after another, in the order in which they came."""
    lock = asyncio.Lock()

    async def alone(item: Decoded) -> Inferred:
        async with lock:
            return (await infer([item]))[0]

    async def run(item: Decoded) -> Inferred:
        # Where the caller goes away while the model works, the next image still waits for its end.
        return await asyncio.shield(asyncio.create_task(alone(item)))

    return run


def ray_batching(settings: Settings) -> Batching:
    """Ray Serve's dynamic batching, by pixels; works in a replica only."""
    from ray import serve

    limit = settings.max_batch_pixels
    batching: Any = serve.batch(
        max_batch_size=limit,
        batch_wait_timeout_s=settings.batch_wait_s,
        # Ray refuses an item above the limit; a large image passes alone instead.
        batch_size_fn=lambda items: min(limit, items[0].pixels) + sum(item.pixels for item in items[1:]),
    )
    return batching


class Replica:
    """One process with the model in service. A bad image is an answer (`Rejection`), never an exception."""

    def __init__(
        self,
        settings: Settings,
        *,
        batching: Batching | None = None,
        shelving: Shelving | None = None,
        source: Source | None = None,
        decoder: Decoding | None = None,
        open_root: Callable[[str], ObjectStore] = open_store,
    ) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        self._settings = settings
        source = source or Published(settings)
        self._service = InService(source)
        self._others = Others(source, shelving or ray_shelving(settings))
        self._decoder = decoder or decoder_of(settings)
        self._infer_one = (batching or batching_of(settings))(self.infer)
        self._following: asyncio.Task[None] | None = None
        self._turn, self._one_large = asyncio.Lock(), asyncio.Lock()
        self._large = large_images(settings, open_root)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Answer with `user_config["model"]` from now on, and follow it where it is an alias.

        Raises:
            KintsugiError: the model cannot be used, and there is no other to go on with.
        """
        reference = user_config.get("model")
        if not isinstance(reference, str):
            raise ConfigError("user_config must name a model, for example {'model': 'unet@production'}")
        await self._service.use(reference)
        if self._following is None and self._settings.follow_s > 0:
            self._following = asyncio.create_task(self._service.follow(self._settings.follow_s))

    def check_health(self) -> None:
        """Raise unless a model is in place. Never asks the store: its failure must not restart a replica."""
        _ = self._service.loaded

    async def describe(self) -> Serving:
        return self._service.describe()

    async def resolve(self, model: str | None) -> LoadedModel:
        """The version that a request with this `model` gets now."""
        if model is None:
            return self._service.loaded.version
        found = await self._others.find(model)
        return LoadedModel(found.name, found.number, found.digest)

    async def published(self) -> list[dict[str, Any]]:
        """All models of the store. A replica's work, since reading them takes torch, which the ingress never loads."""
        return await asyncio.to_thread(list_published, self._settings.store)

    async def restore(self, job: Job) -> Answer | Rejection:
        """Decode, restore with whoever else asks at the moment, and encode in kind."""
        try:
            async with asyncio.timeout(job.budget_s):
                return await self._restored(job)
        except TimeoutError:
            return Rejection("timeout", f"no answer within {job.budget_s:g} s: try again, or send smaller images")
        except KintsugiError as error:
            return _rejection(error)

    async def restore_large(self, job: LargeJob) -> LargeAnswer | Rejection:
        """Restore from S3 to S3 by way of the disk, one image at a time; others pass the model meanwhile."""
        gone = threading.Event()
        work = asyncio.create_task(self._restored_large(job, gone.is_set))
        work.add_done_callback(_heard)
        try:
            async with asyncio.timeout(job.budget_s):
                # Where the caller goes away, the next one still waits for the end: there is one scratch at a time.
                return await asyncio.shield(work)
        except TimeoutError:
            return Rejection("timeout", f"not restored within {job.budget_s:g} s: {USE_A_BATCH}")
        except KintsugiError as error:
            return _private(_rejection(error))
        finally:
            gone.set()

    async def _restored_large(self, job: LargeJob, gone: Callable[[], bool]) -> LargeAnswer:
        async with self._one_large:
            if gone():
                raise Abandoned("nobody waits for this image any more")
            loaded = self._service.loaded if job.model is None else await self._others.get(job.model)
            turn = Turn(self._turn)
            return await asyncio.to_thread(self._large.restore, job, loaded.version, loaded.model, gone, turn)

    async def _restored(self, job: Job) -> Answer:
        loaded = self._service.loaded if job.model is None else await self._others.get(job.model)
        started = time.perf_counter()
        image, mask = await self._decoder.decode(
            job.image, job.mask, white_level=job.white_level, max_pixels=self._settings.max_pixels
        )
        decoded = Decoded(image, mask, loaded, _ms_since(started))
        try:
            inferred = await self._infer_one(decoded)
        finally:
            decoded.waiting = False
        if isinstance(inferred.result, KintsugiError):
            raise inferred.result
        answer = await asyncio.to_thread(_answer, job, decoded, inferred.result, inferred)
        tell_stages(answer.timing_ms)
        return answer

    async def infer(self, batch: list[Decoded]) -> list[Inferred]:
        """Run the models; what nobody waits for any more is dropped, also halfway through a large image."""
        async with self._turn:
            return await self._inferred(batch)

    async def _inferred(self, batch: list[Decoded]) -> list[Inferred]:
        begun = time.perf_counter()
        results: dict[int, Restoration | KintsugiError] = {}
        for loaded in {id(item.loaded): item.loaded for item in batch if item.waiting}.values():
            members = [i for i, item in enumerate(batch) if item.loaded is loaded and item.waiting]
            found = await asyncio.to_thread(_restore_batch, loaded, [batch[i] for i in members])
            results |= zip(members, found, strict=True)
        spent = _ms_since(begun)
        gone = Abandoned("nobody waits for this image any more")
        return [
            Inferred(results.get(i, gone), 1000 * (begun - item.since), spent, len(results))
            for i, item in enumerate(batch)
        ]


def _restore_batch(loaded: Loaded, batch: list[Decoded]) -> "list[Restoration | KintsugiError]":
    """As the model, but an image that makes it fail does not take its neighbours along."""
    images, masks = [item.image for item in batch], [item.mask for item in batch]
    try:
        return list(loaded.model.restore_batch(images, masks, stop=lambda: not any(item.waiting for item in batch)))
    except Abandoned as gone:
        return [gone] * len(batch)
    except Exception as error:
        if len(batch) > 1:
            return [result for item in batch for result in _restore_batch(loaded, [item])]
        logger.exception("the model failed on an image of %s", batch[0].image.pixels.shape)
        return [KintsugiError(f"the model failed on this image ({type(error).__name__}): report the request id")]


def large_images(settings: Settings, open_root: Callable[[str], ObjectStore] = open_store) -> LargeImages:
    limits = Limits(settings.max_streamed_pixels, settings.max_streamed_bytes, settings.decode_timeout_s)
    return LargeImages(settings.store, open_root, limits.here(), cache_folder() / "scratch")


def _heard(work: "asyncio.Task[LargeAnswer]") -> None:
    """Else asyncio would complain of an error that a caller who went away never heard."""
    if not work.cancelled():
        work.exception()


def _private(rejection: Rejection) -> Rejection:
    """What a store says of itself is for its operator."""
    if not rejection.code.startswith("store_"):
        return rejection
    logger.error("a large image was not restored: %s", rejection.detail)
    return Rejection(rejection.code, "the object store refused or failed: try again, or ask the operator")


def _rejection(error: KintsugiError) -> Rejection:
    if isinstance(error, (ImageError, Refusal)):
        return Rejection(error.code, str(error))
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "internal")
    if code == "internal":
        logger.error("an image was not restored: %s", error)
    return Rejection(code, str(error))


def _answer(job: Job, decoded: Decoded, restoration: "Restoration", inferred: Inferred) -> Answer:
    started = time.perf_counter()
    version, report = decoded.loaded.version, restoration.report
    check_kind(decoded.image, restoration.image)
    taken = hashlib.sha256(job.image).hexdigest()
    note = json.dumps(facts(taken, version, restoration), sort_keys=True) if job.embed else None
    data = imaging.encode(restoration.image, note=note)
    shown = _defect_png(restoration.defect_map) if job.defect_map else None
    timing = {
        "decode": decoded.decode_ms,
        "queue": inferred.queue_ms,
        "model": inferred.model_ms,
        "encode": _ms_since(started),
    }
    return Answer(
        data,
        restoration.image.format,
        version,
        float(report.retention),
        bool(report.alarm),
        {**report.to_dict(), "defect_map": _statistics(restoration.defect_map)},
        taken,
        hashlib.sha256(data).hexdigest(),
        shown,
        {name: round(value, 3) for name, value in timing.items()},
        inferred.batch,
    )


def facts(input_sha256: str, version: LoadedModel, restoration: "Restoration") -> dict[str, Any]:
    """What a file says of itself on request; the same for the same image and model, so that its bytes are too."""
    report, image = restoration.report, restoration.image
    return {
        "kintsugi": version_of("kintsugi"),
        "model": version.label,
        "model_digest": version.digest,
        "input_sha256": input_sha256,
        "pixels_sha256": hashlib.sha256(np.ascontiguousarray(image.pixels).data).hexdigest(),
        "white_level": image.white_level,
        "retention": round(float(report.retention), 6),
        "alarm": bool(report.alarm),
        "abstained": report.abstained,
    }


def _statistics(defect_map: NDArray[np.float32] | None) -> dict[str, float] | None:
    if defect_map is None:
        return None
    found = {"max": defect_map.max(), "mean": defect_map.mean(), "area": (defect_map > 0.5).mean()}
    return {name: round(float(value), 6) for name, value in found.items()}


def _defect_png(defect_map: NDArray[np.float32] | None) -> bytes | None:
    if defect_map is None:
        return None
    return imaging.encode(imaging.Image(np.rint(defect_map * 255).astype(np.uint8)))


def check_kind(source: imaging.Image, restored: imaging.Image) -> None:
    """Raise KintsugiError unless the model answered in kind."""
    if restored.pixels.shape != source.pixels.shape or restored.pixels.dtype != source.pixels.dtype:
        raise KintsugiError(
            f"the model answered {restored.pixels.dtype} {restored.pixels.shape} "
            f"to {source.pixels.dtype} {source.pixels.shape}: publish another version"
        )


def _ms_since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)
