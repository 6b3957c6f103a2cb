"""Batches on a cluster: each is run by an actor of its own, which goes on where the last one ended.

Nothing here imports Ray or torch before it runs.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kintsugi.errors import ConfigError, KintsugiError, ObjectNotFound
from kintsugi.storage import LONG, Patience, open_store
from kintsugi_serve.batches.batch import Batch, BatchRequest, Progress, list_batches, load_batch, make_batch
from kintsugi_serve.batches.records import Records
from kintsugi_serve.batches.run import RunOptions, run_batch, told
from kintsugi_serve.jobs import LoadedModel

logger = logging.getLogger(__name__)

NAMESPACE = "kintsugi"
SHOWN = 50
"""Batches of a tenant that are listed."""
_RESTARTS = 10


class BatchRunner:
    """An actor that works at one batch from its birth, so also when Ray starts it anew, and then goes away."""

    def __init__(self, store_uri: str, tenant: str, id: str, options: RunOptions) -> None:
        import ray

        self._me = ray.get_runtime_context().current_actor
        self._working = True
        threading.Thread(target=self._run, args=(store_uri, tenant, id, options), daemon=True).start()

    def working(self) -> bool:
        return self._working

    def _run(self, store_uri: str, tenant: str, id: str, options: RunOptions) -> None:
        import ray

        try:
            work(store_uri, tenant, id, options)
        finally:
            self._working = False
            ray.kill(self._me, no_restart=True)


def work(store_uri: str, tenant: str, id: str, options: RunOptions) -> None:
    """Run what a batch has to do; why it ends early is left in the store."""
    store = open_store(store_uri, LONG)
    records = Records(store, load_batch(store, tenant, id))
    try:
        records.go_on()
        plan = records.next_plan()
        if plan is not None:
            run_batch(records, plan, store_uri, options)
    except Exception as error:
        logger.exception("batch %s stopped", id)
        records.stop(str(told(error, id)))


Resolve = Callable[[str, str], LoadedModel]


def resolve_here(store_uri: str, reference: str) -> LoadedModel:
    """The published model that `reference` names. Loads torch."""
    from kintsugi.registry import Registry

    found = Registry(open_store(store_uri)).resolve(reference)
    return LoadedModel(found.name, found.number, found.digest)


def resolve_there(store_uri: str, reference: str) -> LoadedModel:
    """As `resolve_here`, in a task on the cluster, since the ingress never loads torch."""
    import ray
    from ray.exceptions import RayTaskError

    task: Any = ray.remote(num_cpus=0)(resolve_here)
    try:
        return ray.get(task.remote(store_uri, reference))
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, KintsugiError) else error from error


@dataclass
class RayBatchService:
    """Batches of a store, each run by a named actor of its own; needs a connected cluster.

    Attributes:
        model: what is used where a request names none.
        detached: the actors outlive this process and whoever asked.
    """

    store_uri: str
    model: str | None = None
    options: RunOptions = field(default_factory=RunOptions)
    resolve: Resolve = resolve_there
    detached: bool = True

    def __post_init__(self) -> None:
        self._store = open_store(self.store_uri)
        self._known: dict[tuple[str, str], Records] = {}
        self._started: Any = None  # an actor that is not detached lives as long as a handle to it

    def start(self, tenant: str, request: BatchRequest) -> Progress:
        """Begin the batch, or go on with it; what runs is left to run.

        Raises:
            KintsugiError: as `prepare`.
        """
        return self.resume(tenant, self.prepare(tenant, request))

    def prepare(self, tenant: str, request: BatchRequest) -> str:
        """Note what is asked for; the batch's id.

        Raises:
            ConfigError: the prefixes do not fit, or no model is named.
            ModelNotFound: there is no such model.
            ObjectNotFound: there is nothing to restore.
        """
        reference = request.model or self.model
        if reference is None:
            raise ConfigError("name a model, for example unet@production")
        version = self.resolve(self.store_uri, reference)
        batch = make_batch(self.store_uri, tenant, request.input, request.output, version, request.white_level)
        if next(open_store(batch.input).list(), None) is None:
            raise ObjectNotFound(f"there is nothing under {batch.input}: check the prefix")
        Records(self._store, batch, Patience()).save()
        return batch.id

    def resume(self, tenant: str, id: str) -> Progress:
        """Go on with a batch that is known.

        Raises:
            ObjectNotFound: there is none.
        """
        batch = load_batch(self._store, tenant, id)
        self._launch(batch)
        return self.progress(tenant, batch.id)

    def progress(self, tenant: str, id: str) -> Progress:
        """How far a batch is.

        Raises:
            ObjectNotFound: there is none.
        """
        key = (tenant, id)
        records = self._known.get(key) or Records(self._store, load_batch(self._store, tenant, id), Patience())
        # First whether it lives: what has ended since has told the store before.
        progress = records.progress(alive=_runner(id) is not None)
        if progress.status == "running":
            self._known[key] = records
        else:
            self._known.pop(key, None)
        return progress

    def list(self, tenant: str) -> list[Progress]:
        """The newest batches of a tenant."""
        return [self.progress(tenant, batch.id) for batch in list_batches(self._store, tenant)[:SHOWN]]

    def _launch(self, batch: Batch) -> None:
        if _works(batch.id):
            return
        import ray

        lasting: dict[str, Any] = {"lifetime": "detached"} if self.detached else {}
        runner: Any = ray.remote(num_cpus=0, max_restarts=_RESTARTS)(BatchRunner)
        # Of two who ask at the same moment one starts it, and the other gets the same.
        named = runner.options(name=_name(batch.id), namespace=NAMESPACE, get_if_exists=True, **lasting)
        self._started = named.remote(self.store_uri, batch.tenant, batch.id, self.options)


def _works(id: str) -> bool:
    """Whether an actor works at the batch. One that has ended and is not gone yet is waited for."""
    import ray
    from ray.exceptions import RayActorError

    while (found := _runner(id)) is not None:
        try:
            if ray.get(found.working.remote()):
                return True
            ray.kill(found, no_restart=True)
        except RayActorError:
            continue
    return False


def _name(id: str) -> str:
    return f"BatchRunner:{id}"


def _runner(id: str) -> Any:
    import ray

    try:
        return ray.get_actor(_name(id), namespace=NAMESPACE)
    except ValueError:
        return None
