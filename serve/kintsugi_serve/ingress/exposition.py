"""What `/metrics` answers: one ingress process's registry, each series with the name of that process."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator

from prometheus_client import CollectorRegistry, Gauge, Metric, generate_latest

from kintsugi.errors import KintsugiError
from kintsugi.manifest import MANIFEST
from kintsugi.storage import ObjectStore

LOOK_EVERY_S = 300.0


class Exposition:
    """The registry as Prometheus reads it.

    Several ingress processes answer at one address, each with counters of its own. Without a label that tells them
    apart, every change from one to another would look like a counter that began anew.

    Args:
        look: brings the figures of the model in service up to date; it may fail.
        store: where published models lie.
    """

    def __init__(
        self, registry: CollectorRegistry, look: Callable[[], Awaitable[object]], store: Callable[[], ObjectStore]
    ) -> None:
        self._registry, self._look, self._store = registry, look, store
        self._process = uuid.uuid4().hex[:12]
        self._looked: float | None = None
        self._torn = Gauge(
            "kintsugi_torn_publishes", "Model versions in the store without their manifest", registry=registry
        )

    async def text(self) -> bytes:
        # A scrape must answer also where no replica or no store does.
        with contextlib.suppress(KintsugiError):
            await self._look()
        if self._looked is None or time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            with contextlib.suppress(KintsugiError):
                self._torn.set(await asyncio.to_thread(lambda: torn_publishes(self._store())))
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            named = Metric(family.name, family.documentation, family.type, family.unit)
            for sample in family.samples:
                named.samples.append(sample._replace(labels={**sample.labels, "process": self._process}))
            yield named


def torn_publishes(store: ObjectStore) -> int:
    """Version folders whose manifest is not there: being published just now, or left by a publisher that died."""
    keys = {info.key for info in store.list("models/") if "/versions/" in info.key}
    prefixes = {key.rpartition("/")[0] for key in keys}
    return sum(f"{prefix}/{MANIFEST}" not in keys for prefix in prefixes)
