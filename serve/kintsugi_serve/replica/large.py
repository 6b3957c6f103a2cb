"""Images too large to be held: from store to store by way of the disk, in strips."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from kintsugi.errors import Abandoned, ImageError, KintsugiError, ObjectNotFound
from kintsugi.imaging import Image
from kintsugi.restore.strips import write_strips
from kintsugi.storage import ObjectStore, create
from kintsugi_serve.access.addresses import S3Address
from kintsugi_serve.decoding.scratch import check_space, disk_full, scratch_folder
from kintsugi_serve.decoding.strips import Limits, Question, RawRows, Stop, starts_as_tiff, unpack
from kintsugi_serve.jobs import Answer, LargeAnswer, LargeJob, LoadedModel
from kintsugi_serve.objects.results import CREATE_S, Content, Results, content_at, result_facts, result_key
from kintsugi_serve.schemas import Refusal

if TYPE_CHECKING:
    from kintsugi.restore.restorer import Band
    from kintsugi.restore.sources import MaskSource, RowSource
    from kintsugi.trust.report import Report

logger = logging.getLogger(__name__)


class StripModel(Protocol):
    """What a large image needs of `kintsugi.restore.restorer.Restorer`."""

    def restore_strips(
        self,
        source: "RowSource",
        write: Callable[[Iterator[Image]], None],
        mask: "MaskSource | None" = None,
        *,
        maps: "Callable[[Band], None] | None" = None,
        stop: Stop = ...,
    ) -> "Report": ...


@dataclass(frozen=True)
class Fetched:
    """An object on the disk; whoever is done with it deletes it."""

    path: Path
    uri: str
    content: Content

    @property
    def is_tiff(self) -> bool:
        with self.path.open("rb") as stream:
            return starts_as_tiff(stream.read(4))


@dataclass(frozen=True)
class Restored:
    """A restored TIFF on the disk. `defect_map` has its largest value, its mean, and the share above one half."""

    path: Path
    report: "Report"
    defect_map: dict[str, float] | None
    decode_ms: float
    model_ms: float


def fetch(store: ObjectStore, key: str, path: Path, limits: Limits, *, other_bytes: int = 0) -> Fetched:
    """Bring an object onto the disk; its size is looked at first, and whether it begins as a TIFF.

    Args:
        other_bytes: what an image that is no TIFF may have.

    Raises:
        ImageError: `too_large`.
        ObjectNotFound: it is not there.
        Refusal: `unavailable`, the disk is too full.
    """
    uri = f"{store.uri}/{key}"
    size = store.size(key)
    if size > limits.max_bytes:
        raise ImageError("too_large", f"{uri} has {size} bytes, more than {limits.max_bytes}: cut the image")
    if size > other_bytes and not starts_as_tiff(store.get_start(key, 4)):
        told = f"{uri} has {size} bytes, too many for an image that is no TIFF"
        raise ImageError("too_large", f"{told}: save it as TIFF, also a mask")
    check_space(path.parent, size)
    store.download(key, path)
    return Fetched(path, uri, Content.of(path))


def restore_on_disk(
    model: StripModel,
    image: Fetched,
    mask: Fetched | None,
    white_level: int | None,
    limits: Limits,
    stop: Stop = lambda: False,
    turn: "Turn | None" = None,
) -> Restored:
    """Restore a TIFF into another one beside it. The pixels and the report are those of an image restored whole.

    Beside the files that came, and which are gone then, there is one copy of the pixels on the disk at a time, and
    the result.

    Args:
        stop: whether nobody waits any more; asked before each tile.
        turn: the model's time is passed on before each tile.

    Raises:
        ImageError, Refusal, Abandoned: as `strips.unpack` and `Restorer.restore_strips`.
    """
    started = time.perf_counter()
    source = _unpacked(Question(image.path, image.content.sha256, white_level), limits, stop)
    known = _unpacked(Question(mask.path, mask.content.sha256, mask=True), limits, stop) if mask else None
    check_space(source.path.parent, source.head.bytes)
    target, shown, begun = image.path.with_name("restored.tiff"), _DefectMap(), time.perf_counter()
    height, like = source.size[0], source.rows(0, 1)

    def write(bands: Iterator[Image]) -> None:
        write_strips(target, like, height, bands)

    with turn or Turn() as passing:
        report = _restored(model, source, write, known, shown, lambda: passing.passed_on() and stop())
    source.path.unlink()
    ended = time.perf_counter()
    return Restored(target, report, shown.statistics(), 1000 * (begun - started), 1000 * (ended - begun))


def is_same(store: ObjectStore, key: str, data: bytes | Path) -> bool:
    """Whether an object holds these bytes, or those of a file."""
    if isinstance(data, bytes):
        return store.size(key) == len(data) and store.get(key) == data
    path = data
    if store.size(key) != path.stat().st_size:
        return False
    aside = path.with_name(f"{path.name}-there")
    try:
        check_space(path.parent, path.stat().st_size)
        return content_at(store, key, aside) == Content.of(path)
    finally:
        aside.unlink(missing_ok=True)


class Turn:
    """The model's time, which a thread shares with what runs on an asyncio loop; without a lock, all of it.

    The lock goes round in the order in which it was asked for.
    """

    def __init__(self, lock: asyncio.Lock | None = None) -> None:
        self._lock = lock
        self._loop = None if lock is None else asyncio.get_running_loop()
        self._held = False

    def __enter__(self) -> Self:
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give()

    def passed_on(self) -> bool:
        """True, once everybody who was waiting has had a turn."""
        self._give()
        self._take()
        return True

    def _take(self) -> None:
        if self._lock is not None and self._loop is not None:
            try:
                asyncio.run_coroutine_threadsafe(self._lock.acquire(), self._loop).result()
            except CancelledError as error:
                raise Abandoned("the replica ends") from error
            self._held = True

    def _give(self) -> None:
        if self._held and self._lock is not None and self._loop is not None:
            self._held = False
            self._loop.call_soon_threadsafe(self._lock.release)


@dataclass(frozen=True)
class LargeImages:
    """Large images of requests: restored once, kept under the address of their question. Its work blocks.

    Attributes:
        store: root of the results.
        open_root: a store for a root.
        scratch: where the files lie that come and go.
    """

    store: str
    open_root: Callable[[str], ObjectStore]
    limits: Limits
    scratch: Path

    def restore(
        self, job: LargeJob, version: LoadedModel, model: StripModel, stop: Stop, turn: Turn | None = None
    ) -> LargeAnswer:
        """The result of the job, kept, and written to its target.

        Raises:
            KintsugiError: as `fetch` and `restore_on_disk`; a Refusal `conflict`, where other bytes are at the target.
        """
        try:
            with scratch_folder(self.scratch) as folder:
                return self._restore(job, version, model, folder, stop, turn)
        except OSError as error:
            raise disk_full(str(error.strerror)) from error

    def _restore(
        self, job: LargeJob, version: LoadedModel, model: StripModel, folder: Path, stop: Stop, turn: Turn | None
    ) -> LargeAnswer:
        image = self._fetch(job.image, folder / "image")
        mask = self._fetch(job.mask, folder / "mask") if job.mask else None
        params = {"white_level": job.white_level, "mask": mask.content.sha256 if mask else None}
        key = result_key(job.tenant, image.content.sha256, version.digest, params)
        results, answer, created = Results(self.open_root(self.store)), None, False
        kept = results.find_file(key, folder / "kept")
        if kept is None:
            restored = restore_on_disk(model, image, mask, job.white_level, self.limits, stop, turn)
            answer = _answer(restored, version, image.content.sha256)
            kept, created = results.keep_file(key, restored.path, result_facts(answer))
        # Kept in any case, for who asks again; written for who still waits.
        if stop():
            raise Abandoned("nobody waits for this image any more")
        written = self._write_once(job.target, kept.path) if job.target else None
        return LargeAnswer(kept.uri, kept.facts, created, written, answer)

    def _fetch(self, address: S3Address, path: Path) -> Fetched:
        try:
            return fetch(self.open_root(address.root), address.key, path, self.limits)
        except ObjectNotFound:
            raise Refusal("not_found", f"there is no {address.uri}") from None

    def _write_once(self, address: S3Address, path: Path) -> bool:
        store, key = self.open_root(address.root), address.key
        same = create(store, key, path, lambda: is_same(store, key, path), seconds=CREATE_S)
        if same is False:
            raise Refusal("conflict", f"{address.uri} holds something else: choose another")
        return same is None


@dataclass
class _DefectMap:
    """What is said of a defect map that passes in bands."""

    pixels: int = 0
    total: float = 0.0
    above: int = 0
    most: float = 0.0

    def add(self, band: "Band") -> None:
        if band.defect_map is not None:
            self.pixels += band.defect_map.size
            self.total += float(band.defect_map.sum(dtype=np.float64))
            self.above += int((band.defect_map > 0.5).sum())
            self.most = max(self.most, float(band.defect_map.max()))

    def statistics(self) -> dict[str, float] | None:
        if not self.pixels:
            return None
        found = {"max": self.most, "mean": self.total / self.pixels, "area": self.above / self.pixels}
        return {name: round(value, 6) for name, value in found.items()}


def _unpacked(question: Question, limits: Limits, stop: Stop) -> RawRows:
    """The rows of a TIFF, in whose place they come."""
    rows = unpack(question, question.source.with_suffix(".rows"), limits, stop)
    question.source.unlink()
    return rows


def _restored(
    model: StripModel,
    source: RawRows,
    write: Callable[[Iterator[Image]], None],
    mask: RawRows | None,
    shown: _DefectMap,
    stop: Stop,
) -> "Report":
    try:
        return model.restore_strips(source, write, mask, maps=shown.add, stop=stop)
    except KintsugiError:
        raise
    except OSError as error:
        raise disk_full(str(error.strerror)) from error
    except Exception as error:
        logger.exception("the model failed on an image of %s", source.size)
        raise KintsugiError(
            f"the model failed on this image ({type(error).__name__}): report the request id"
        ) from error


def _answer(restored: Restored, version: LoadedModel, input_sha256: str) -> Answer:
    report = restored.report
    return Answer(
        b"",
        "tiff",
        version,
        float(report.retention),
        bool(report.alarm),
        {**report.to_dict(), "defect_map": restored.defect_map},
        input_sha256,
        Content.of(restored.path).sha256,
        timing_ms={"decode": round(restored.decode_ms, 3), "model": round(restored.model_ms, 3)},
    )
