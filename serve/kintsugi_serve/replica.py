"""Replica: holds one published model, answers in batches, and swaps the model in place."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kintsugi import imaging
from kintsugi.errors import ConfigError, ImageError, KintsugiError
from kintsugi.storage import open_store
from kintsugi_serve.schemas import Answer, Job, LoadedModel, Rejection, Settings

if TYPE_CHECKING:
    from kintsugi.restore.restorer import Restoration

logger = logging.getLogger(__name__)


class Model(Protocol):
    """What a replica needs of `kintsugi.restore.restorer.Restorer`."""

    def restore_batch(
        self, images: Sequence[imaging.Image], masks: Sequence[NDArray[np.bool_] | None]
    ) -> "Sequence[Restoration | KintsugiError]": ...


@dataclass(frozen=True)
class Loaded:
    """A model in memory and the version it is."""

    model: Model
    version: LoadedModel


@dataclass(frozen=True)
class Decoded:
    image: imaging.Image
    mask: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Inferred:
    """What the model said of one image, and which version said it."""

    result: "Restoration | KintsugiError"
    version: LoadedModel


Infer = Callable[[list[Decoded]], Awaitable[list[Inferred]]]
Batching = Callable[[Infer], Callable[[Decoded], Awaitable[Inferred]]]
Loader = Callable[[str, Settings, LoadedModel | None], Loaded | None]


def load_published(reference: str, settings: Settings, current: LoadedModel | None = None) -> Loaded | None:
    """The verified model that `reference` names, tried on one image; None if `current` is that version.

    Raises:
        KintsugiError: it does not exist, is damaged, or does not restore.
    """
    from kintsugi.registry import Registry
    from kintsugi.restore.restorer import Restorer

    registry = Registry(open_store(settings.store))
    found = registry.resolve(reference)
    version = LoadedModel(found.name, found.number, found.digest)
    if version == current:
        return None
    model = Restorer.from_checkpoint(registry.fetch(found), device=settings.device)
    check_model(model, version)
    return Loaded(model, version)


def check_model(model: Model, version: LoadedModel) -> None:
    """Restore one small image, so that a model that cannot is found before it gets traffic."""
    ramp = np.linspace(40, 215, 64, dtype=np.uint8)
    probe = imaging.Image(np.add.outer(ramp // 2, ramp // 2).astype(np.uint8))
    mask = np.zeros(probe.size, dtype=np.bool_)
    mask[28:36, 28:36] = True
    result = model.restore_batch([probe], [mask])[0]
    if isinstance(result, KintsugiError):
        raise ConfigError(f"{version.label} does not restore a plain grey image ({result}): publish another version")
    _check_kind(probe, result.image)


def list_published(store: str) -> list[dict[str, Any]]:
    """Names, aliases and versions of every published model."""
    from kintsugi.registry import Registry

    registry = Registry(open_store(store))
    return [
        {
            "name": name,
            "aliases": registry.aliases(name),
            "versions": [
                {"version": found.number, "digest": found.digest, "created": found.created}
                for found in registry.versions(name)
            ],
        }
        for name in registry.names()
    ]


def ray_batching(settings: Settings) -> Batching:
    """Ray Serve's dynamic batching; works in a replica only."""
    from ray import serve

    batching: Any = serve.batch(max_batch_size=settings.max_batch_size, batch_wait_timeout_s=settings.batch_wait_s)
    return batching


class Replica:
    """One process with one model. A bad image is an answer (`Rejection`), never an exception."""

    def __init__(self, settings: Settings, *, batching: Batching | None = None, load: Loader = load_published) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        self._settings = settings
        self._load = load
        self._loaded: Loaded | None = None
        self._swapping = asyncio.Lock()
        self._infer_one = (batching or ray_batching(settings))(self.infer)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Put `user_config["model"]` in place of the present model; requests go on with the old one meanwhile.

        Raises:
            KintsugiError: the new model cannot be used; the old one stays.
        """
        reference = user_config.get("model")
        if not isinstance(reference, str):
            raise ConfigError("user_config must name a model, for example {'model': 'unet@production'}")
        async with self._swapping:
            current = self._loaded.version if self._loaded else None
            loaded = await asyncio.to_thread(self._load, reference, self._settings, current)
            if loaded is not None:
                self._loaded = loaded
                logger.info("serving %s (%s)", loaded.version.label, loaded.version.digest)

    def check_health(self) -> None:
        """Raise unless a model is in place. Never asks the store: its failure must not restart a replica."""
        self._current()

    async def describe(self) -> LoadedModel:
        return self._current().version

    async def published(self) -> list[dict[str, Any]]:
        """All models of the store. A replica's work, since reading them takes torch, which the ingress never loads."""
        return await asyncio.to_thread(list_published, self._settings.store)

    async def restore(self, job: Job) -> Answer | Rejection:
        """Decode, restore with whoever else asks at the moment, and encode in kind."""
        try:
            decoded = await asyncio.to_thread(self._decode, job)
        except ImageError as error:
            return _rejection(error)
        inferred = await self._infer_one(decoded)
        if isinstance(inferred.result, KintsugiError):
            return _rejection(inferred.result)
        return await asyncio.to_thread(_answer, decoded.image, inferred.result, inferred.version)

    async def infer(self, batch: list[Decoded]) -> list[Inferred]:
        """Run the model; every image of a batch is answered by the same version."""
        loaded = self._current()
        results = await asyncio.to_thread(_restore_batch, loaded.model, batch)
        return [Inferred(result, loaded.version) for result in results]

    def _decode(self, job: Job) -> Decoded:
        limit = self._settings.max_pixels
        image = imaging.decode(job.image, white_level=job.white_level, max_pixels=limit)
        mask = imaging.decode_mask(job.mask, max_pixels=limit) if job.mask is not None else None
        return Decoded(image, mask)

    def _current(self) -> Loaded:
        if self._loaded is None:
            raise ConfigError("this replica holds no model yet")
        return self._loaded


def _restore_batch(model: Model, batch: list[Decoded]) -> "Sequence[Restoration | KintsugiError]":
    """As the model, but an image that makes it fail does not take its neighbours along."""
    try:
        return model.restore_batch([item.image for item in batch], [item.mask for item in batch])
    except Exception as error:
        if len(batch) > 1:
            return [result for item in batch for result in _restore_batch(model, [item])]
        logger.exception("the model failed on an image of %s", batch[0].image.pixels.shape)
        return [KintsugiError(f"the model failed on this image ({type(error).__name__}): report the request id")]


def _rejection(error: KintsugiError) -> Rejection:
    return Rejection(error.code if isinstance(error, ImageError) else "internal", str(error))


def _answer(source: imaging.Image, restoration: "Restoration", version: LoadedModel) -> Answer | Rejection:
    try:
        _check_kind(source, restoration.image)
        data = imaging.encode(restoration.image)
    except KintsugiError as error:
        logger.exception("the restored image cannot be answered")
        return Rejection("internal", str(error))
    report = restoration.report
    return Answer(
        data, restoration.image.format, version, float(report.retention), bool(report.alarm), report.to_dict()
    )


def _check_kind(source: imaging.Image, restored: imaging.Image) -> None:
    if restored.pixels.shape != source.pixels.shape or restored.pixels.dtype != source.pixels.dtype:
        raise KintsugiError(
            f"the model answered {restored.pixels.dtype} {restored.pixels.shape} "
            f"to {source.pixels.dtype} {source.pixels.shape}: publish another version"
        )
