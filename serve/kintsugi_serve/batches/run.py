"""Restores the images of a batch: one, a block of them, and as a Ray Data job all that a round has left.

Nothing here imports Ray or torch before it runs.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kintsugi import imaging
from kintsugi.errors import (
    ConfigError,
    ImageError,
    KintsugiError,
    ObjectNotFound,
    RunInterrupted,
    StoreError,
    StoreUnavailable,
)
from kintsugi.storage import LONG, ObjectStore, Patience, cache_folder, checked_key, create, open_store, sha256
from kintsugi_serve.batches.batch import (
    Batch,
    Counts,
    Done,
    Input,
    Line,
    Plan,
)
from kintsugi_serve.batches.records import Records
from kintsugi_serve.decoding.scratch import scratch_folder
from kintsugi_serve.decoding.strips import Limits, starts_as_tiff
from kintsugi_serve.objects.results import Content
from kintsugi_serve.replica.large import StripModel, fetch, is_same, restore_on_disk
from kintsugi_serve.schemas import Refusal

if TYPE_CHECKING:
    from kintsugi.restore.restorer import Restoration
    from kintsugi.trust.report import Report

logger = logging.getLogger(__name__)

MAX_BYTES = 2**30
HELD_BYTES = 2**26
"""Of a TIFF's file that is held in memory; larger ones pass in strips."""
_PATIENCE = Patience(seconds=300.0)
_AWAY = 3
"""Images in a row that the store does not answer for: then it is the store, not the image."""


class Model(StripModel, Protocol):
    """What a batch needs of `kintsugi.restore.restorer.Restorer`."""

    def restore(self, image: imaging.Image) -> "Restoration": ...


@dataclass(frozen=True)
class RunOptions:
    """What a run may take of the cluster; has no bearing on the results, save `threads` (see Restorer).

    Attributes:
        concurrency: actors at most; each holds one model and one image.
        max_bytes: of one object, unless it is restored in strips.
        streamed: what may be.
    """

    concurrency: int = 2
    num_cpus: float = 0.5
    num_gpus: float = 0.0
    threads: int = 1
    max_bytes: int = MAX_BYTES
    streamed: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.threads < 1:
            raise ConfigError(
                f"a batch needs at least one actor of one thread (got {self.concurrency}, {self.threads})"
            )

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus > 0 else "cpu"


Load = Callable[[str, Batch, RunOptions], Model]


def load_published(store_uri: str, batch: Batch, options: RunOptions) -> Model:
    """The batch's model version, fetched and verified."""
    import torch

    from kintsugi.registry import Registry
    from kintsugi.restore.restorer import Restorer

    torch.set_num_threads(options.threads)
    registry = Registry(open_store(store_uri, LONG))
    version = registry.resolve(batch.model)
    if version.digest != batch.digest:
        raise ConfigError(f"{batch.model} is another model than when batch {batch.id} was begun: begin another batch")
    return Restorer.from_checkpoint(registry.fetch(version), device=options.device)


@dataclass(frozen=True)
class Bench:
    """Everything that it takes to restore the images of a batch."""

    records: Records
    plan: Plan
    model: Model
    source: ObjectStore
    target: ObjectStore
    max_bytes: int = MAX_BYTES
    streamed: Limits = field(default_factory=Limits)

    @property
    def batch(self) -> Batch:
        return self.records.batch


def restore_block(bench: Bench, items: Sequence[Input]) -> Counts:
    """Restore the images of a block, or what is left of it, and record a line for each.

    A block that was begun before ended its process, perhaps by one of its images: then every image is counted before
    it is tried and recorded after it.

    Raises:
        StoreUnavailable: the store is away; what was done is done again later.
    """
    records, plan = bench.records, bench.plan
    is_new = records.begin_block(plan, items[0].number // plan.block)
    told = set() if is_new else records.recorded(plan, items)
    groups = [items] if is_new else [[item] for item in items if item.key not in told]
    counts, away = Counts(), 0
    for group in groups:
        lines: list[Line] = []
        for item in group:
            may_try = is_new or records.begin_image(plan, item.number)
            lines.append(restore_image(bench, item) if may_try else _poison(bench, item))
            away = away + 1 if lines[-1].code == "store_unavailable" else 0
            if away == _AWAY:
                raise StoreUnavailable(f"{lines[-1].detail}: ask for the batch again when the store answers")
        records.record(plan, group[0].number, lines)
        counts += Counts.of(lines)
    return counts


def restore_image(bench: Bench, item: Input) -> Line:
    """Restore one image; whatever is wrong with it is its line."""
    started = time.perf_counter()
    facts: dict[str, Any] = {}
    try:
        facts |= _restored(bench, item, facts)
    except ImageError as error:
        facts |= _ended("refused", error.code, error)
    except ObjectNotFound as error:
        facts |= _ended("refused", "missing", error)
    except StoreUnavailable as error:
        facts |= _ended("failed", "store_unavailable", error)
    except StoreError as error:
        facts |= _ended("failed", "store_failed", error)
    except Refusal as error:
        facts |= _ended("failed", error.code, error)
    except Exception as error:
        logger.exception("batch %s failed on %s", bench.batch.id, item.key)
        facts |= _ended("failed", "internal", error)
    ms = round(1000 * (time.perf_counter() - started), 1)
    return Line(key=item.key, size=item.size, stamp=item.stamp, digest=bench.batch.digest, ms=ms, **facts)


def _restored(bench: Bench, item: Input, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a line; what is known before anything goes wrong is put into `facts`."""
    try:
        checked_key(item.key)
    except StoreError as error:
        return _ended("refused", "bad_key", error)
    streams = bench.streamed.max_pixels > 0
    most = max(bench.max_bytes, bench.streamed.max_bytes if streams else 0)
    if item.size > most:
        raise ImageError("too_large", f"{item.size} bytes are more than {most}: split the image")
    if streams and item.size > min(HELD_BYTES, bench.max_bytes):
        return _restored_on_disk(bench, item, facts)
    data = bench.source.get(item.key)
    facts["input_sha256"] = sha256(data)
    try:
        return _restored_whole(bench, item, data)
    except ImageError as error:
        if error.code != "too_large" or not streams or not starts_as_tiff(data):
            raise
    del data
    return _restored_on_disk(bench, item, facts)


def _restored_whole(bench: Bench, item: Input, data: bytes) -> dict[str, Any]:
    answer = bench.model.restore(imaging.decode(data, white_level=bench.batch.white_level))
    return _written(bench, item, imaging.encode(answer.image), answer.report)


def _restored_on_disk(bench: Bench, item: Input, facts: dict[str, Any]) -> dict[str, Any]:
    """A TIFF in strips; images of other formats are still held whole, up to `max_bytes`."""
    with scratch_folder(cache_folder() / "scratch") as folder:
        image = fetch(bench.source, item.key, folder / "image", bench.streamed, other_bytes=bench.max_bytes)
        facts["input_sha256"] = image.content.sha256
        if not image.is_tiff:
            return _restored_whole(bench, item, image.path.read_bytes())
        answer = restore_on_disk(bench.model, image, None, bench.batch.white_level, bench.streamed)
        return _written(bench, item, answer.path, answer.report)


def _written(bench: Bench, item: Input, result: bytes | Path, report: "Report") -> dict[str, Any]:
    store, key = bench.target, item.key
    same = create(store, key, result, lambda: is_same(store, key, result), seconds=_PATIENCE.seconds)
    if same is False:
        where = f"{bench.batch.output}/{item.key}"
        return _ended(
            "refused", "conflict", ConfigError(f"{where} holds something else: remove it, or give another output")
        )
    return {
        "status": "restored" if same is None else "kept",
        "output": f"{bench.batch.output}/{item.key}",
        "output_sha256": Content.of(result).sha256,
        "retention": round(float(report.retention), 6),
        "alarm": bool(report.alarm),
        "abstained": report.abstained,
    }


def _poison(bench: Bench, item: Input) -> Line:
    detail = "the process that restored this image ended each time: it may need more memory than there is"
    facts = _ended("refused", "poison", KintsugiError(detail))
    return Line(key=item.key, size=item.size, stamp=item.stamp, digest=bench.batch.digest, **facts)


def _ended(status: str, code: str, error: Exception) -> dict[str, Any]:
    told = str(error) if isinstance(error, KintsugiError) else f"{type(error).__name__}: {error}"
    return {"status": status, "code": code, "detail": told}


class RestoreBlocks:
    """An actor of Ray Data: holds the model, takes blocks, yields only counts."""

    def __init__(self, store_uri: str, batch: Batch, plan: Plan, options: RunOptions, load: Load) -> None:
        # At INFO botocore tells where it found credentials.
        logging.getLogger().setLevel(logging.WARNING)
        # Not now: of what fails in a constructor Ray Data passes on the text only, not the error.
        self._bench = cache(lambda: open_bench(store_uri, batch, plan, options, load))

    def __call__(self, rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for row in rows["items"]:
            counts = restore_block(self._bench(), [Input(*item) for item in json.loads(row)])
            yield {name: [count] for name, count in counts.model_dump().items()}


def open_bench(store_uri: str, batch: Batch, plan: Plan, options: RunOptions, load: Load) -> Bench:
    return Bench(
        Records(open_store(store_uri, LONG), batch),
        plan,
        load(store_uri, batch, options),
        open_store(batch.input, _PATIENCE),
        open_store(batch.output, _PATIENCE),
        options.max_bytes,
        options.streamed.here(),
    )


def run_batch(
    records: Records,
    plan: Plan,
    store_uri: str,
    options: RunOptions | None = None,
    *,
    load: Load = load_published,
    progress: Callable[[Counts], None] = lambda _: None,
) -> Done:
    """Restore what a round has left, on the connected cluster, and finish the round.

    Ray Data starts an actor that died anew and gives out its block again, as often as it takes: every object is
    created once, so that does no harm.

    Args:
        progress: called with the counts of each block, when it is done.

    Raises:
        RunInterrupted: the cluster failed; the same again goes on.
        KintsugiError: the store or the model cannot be used.
    """
    left = records.remaining(plan)
    if left:
        _run(left, store_uri, records.batch, plan, options or RunOptions(), load, progress)
    return records.finish(plan)


def _run(
    blocks: list[list[Input]],
    store_uri: str,
    batch: Batch,
    plan: Plan,
    options: RunOptions,
    load: Load,
    progress: Callable[[Counts], None],
) -> None:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"items": json.dumps([astuple(item) for item in block])} for block in blocks]
    # A row is a block of the plan, and each goes its own way: what is done again after a failure is one of them.
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        RestoreBlocks,
        batch_size=1,
        fn_constructor_args=(store_uri, batch, plan, options, load),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(options.concurrency, len(rows))),
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
    )
    try:
        for row in done.iter_rows():
            progress(Counts.model_validate(row))
    except Exception as error:  # Ray wraps whatever an actor raised in errors of its own
        raise told(error, batch.id) from error


def told(error: BaseException, id: str) -> KintsugiError:
    """The one of our own errors that lies inside what Ray raised, or a sentence about the rest."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", seen)
        if isinstance(cause, KintsugiError):
            return cause
        seen = seen.__cause__
    return RunInterrupted(f"batch {id} stopped ({type(error).__name__}): ask for it again, it goes on ({error})")
