"""Which model a replica answers with: verified beside the old one, followed, and never swapped for a bad one."""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kintsugi import imaging
from kintsugi.errors import IntegrityError, KintsugiError, ModelNotFound, StoreError
from kintsugi.storage import cache_folder, open_store, write_atomically
from kintsugi_serve.jobs import LoadedModel, RefusedModel, Serving
from kintsugi_serve.replica.large import StripModel
from kintsugi_serve.schemas import Settings

if TYPE_CHECKING:
    from kintsugi.registry import ModelVersion
    from kintsugi.restore.restorer import Restoration

logger = logging.getLogger(__name__)


class Model(StripModel, Protocol):
    """What a replica needs of `kintsugi.restore.restorer.Restorer`."""

    def restore_batch(
        self, images: Sequence[imaging.Image], masks: Sequence[NDArray[np.bool_] | None], *, stop: Callable[[], bool]
    ) -> "Sequence[Restoration | KintsugiError]": ...


@dataclass(frozen=True)
class Loaded:
    """A model in memory and the version it is."""

    model: Model
    version: LoadedModel


class Source(Protocol):
    """Where models come from; its methods block."""

    def find(self, reference: str) -> "ModelVersion":
        """The version that the reference names now."""
        ...

    def load(self, version: "ModelVersion") -> Loaded:
        """The verified model. Raises KintsugiError: it is damaged, or does not restore as it did."""
        ...

    def fallbacks(self, reference: str) -> "Sequence[ModelVersion]":
        """Versions that may stand in for what the reference names, the best first."""
        ...

    def keep(self, reference: str, version: "ModelVersion") -> None:
        """Remember the version as one that served."""
        ...


class Published:
    """Models of the store, kept in the node's cache by their digest, so that they load without the store too."""

    def __init__(self, settings: Settings) -> None:
        from kintsugi.registry import Registry

        self._registry = Registry(open_store(settings.store))
        self._device = settings.device

    def find(self, reference: str) -> "ModelVersion":
        return self._registry.resolve(reference)

    def load(self, version: "ModelVersion") -> Loaded:
        from kintsugi.restore.golden import check_golden
        from kintsugi.restore.restorer import Restorer

        folder = self._registry.fetch(version)
        try:
            model = Restorer.from_checkpoint(folder, device=self._device)
            check_golden(model, folder)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:  # what torch raises at strange weights
            raise IntegrityError(f"{version.ref} does not restore ({error}): publish another version") from error
        return Loaded(model, _loaded(version))

    def fallbacks(self, reference: str) -> "Sequence[ModelVersion]":
        from kintsugi.registry import ModelVersion

        path = self._served(reference)
        served = [ModelVersion.model_validate_json(path.read_bytes())] if path.is_file() else []
        try:
            before = self._registry.before(reference)
        except StoreError:
            before = None
        return [*served, before] if before else served

    def keep(self, reference: str, version: "ModelVersion") -> None:
        path = self._served(reference)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, version.model_dump_json().encode())

    def _served(self, reference: str) -> Path:
        key = hashlib.sha256(f"{self._registry.store.uri} {reference}".encode()).hexdigest()
        return cache_folder() / "serving" / f"{key[:32]}.json"


class InService:
    """The model in service: what `reference` names, or the last good one while that is bad or cannot be read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._reference = ""
        self._loaded: Loaded | None = None
        self._refused: RefusedModel | None = None
        self._refused_digest = ""
        self._swapping = asyncio.Lock()

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None:
            raise ModelNotFound("this replica holds no model yet")
        return self._loaded

    def describe(self) -> Serving:
        return Serving(self.loaded.version, self._refused)

    async def use(self, reference: str) -> None:
        """Answer with what `reference` names from now on; requests go on with the old model meanwhile.

        A version that cannot be used is refused, visibly, and the old one goes on.

        Raises:
            KintsugiError: it cannot be used, and there is no other.
        """
        async with self._swapping:
            self._reference, self._refused_digest = reference, ""
            try:
                await self._advance()
            except KintsugiError as error:
                self._refuse(reference, error)
                if self._loaded is None:
                    await self._fall_back(error)

    async def look(self) -> None:
        """See whether the reference names another version now, and answer with it if it is good."""
        async with self._swapping:
            try:
                await self._advance()
            except KintsugiError as error:
                self._refuse(self._reference, error)

    async def follow(self, every_s: float) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            await self.look()

    async def _advance(self) -> None:
        version = await asyncio.to_thread(self._source.find, self._reference)
        if version.digest == self._refused_digest:
            return
        if self._loaded is None or version.digest != self._loaded.version.digest:
            try:
                loaded = await asyncio.to_thread(self._source.load, version)
            except StoreError:
                raise
            except KintsugiError as error:
                self._refused_digest = version.digest
                raise KintsugiError(f"{version.ref} was refused: {error}") from error
            await asyncio.to_thread(self._source.keep, self._reference, version)
            self._loaded = loaded
            logger.info("serving %s (%s)", loaded.version.label, loaded.version.digest)
        self._refused, self._refused_digest = None, ""

    async def _fall_back(self, error: KintsugiError) -> None:
        for version in await asyncio.to_thread(self._source.fallbacks, self._reference):
            try:
                self._loaded = await asyncio.to_thread(self._source.load, version)
            except KintsugiError as worse:
                logger.warning("%s cannot stand in for %s: %s", version.ref, self._reference, worse)
            else:
                logger.warning("serving %s while %s cannot be used", version.ref, self._reference)
                return
        raise error

    def _refuse(self, model: str, error: KintsugiError) -> None:
        if self._refused is None or self._refused.detail != str(error):
            logger.error("the model in service stays: %s", error)
            self._refused = RefusedModel(model, str(error), datetime.now(UTC).isoformat(timespec="seconds"))


Resolve = Callable[[str], Awaitable[Loaded]]
Shelving = Callable[[Resolve], Resolve]


class Others:
    """Models for requests that name one, the least recently used going first."""

    def __init__(self, source: Source, shelving: Shelving) -> None:
        self._source = source
        self._load = shelving(self._loaded)

    async def find(self, reference: str) -> "ModelVersion":
        return await asyncio.to_thread(self._source.find, reference)

    async def get(self, reference: str) -> Loaded:
        """The verified model that `reference` names now.

        Raises:
            KintsugiError: it does not exist, or cannot be used.
        """
        return await self._load((await self.find(reference)).ref)

    async def _loaded(self, reference: str) -> Loaded:
        version = await self.find(reference)
        return await asyncio.to_thread(self._source.load, version)


def ray_shelving(settings: Settings) -> Shelving:
    """Ray Serve's multiplexing, whose router prefers a replica that holds the model; works in a replica only."""
    from ray import serve

    def shelve(load: Resolve) -> Resolve:
        # Ray counts a function's parameters, and would take the bound method's `self` for the model.
        async def get(reference: str) -> Loaded:
            return await load(reference)

        shelved: Any = serve.multiplexed(get, max_num_models_per_replica=settings.other_models)
        return shelved

    return shelve


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


def _loaded(version: "ModelVersion") -> LoadedModel:
    return LoadedModel(version.name, version.number, version.digest)
