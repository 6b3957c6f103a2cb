"""Copies of splits on this machine: fetched once, held while they are read, evicted when room is needed.

Below `cache_folder()/datasets/`, and nothing else there is ever touched:

    <digest>/<split>.arrow    the rows
    <digest>/<split>.json     its size and what was skipped; without it there is no copy
    .kintsugi-fetch           locked by who fetches or evicts: one process of the machine at a time
    .kintsugi-part/           what is on its way
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from kintsugi.data.layouts import SPLITS, BadPair
from kintsugi.data.shards import fetch_shards
from kintsugi.errors import BadRows, CacheFull, ConfigError, IntegrityError
from kintsugi.manifest import Manifest
from kintsugi.sections import Split
from kintsugi.storage import ObjectStore, write_atomically

LIMIT = "KINTSUGI_CACHE_GB"
KEPT_FREE = 0.05
_LOCK, _PART = ".kintsugi-fetch", ".kintsugi-part"
_GROWTH = 1.05
"""Arrow takes up to so much more than Parquet: offsets, and text without a dictionary."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    skipped: tuple[BadPair, ...]


@dataclass(frozen=True)
class SplitSource:
    """Where a split comes from, and the folder `datasets` in which its copy lies."""

    store: ObjectStore
    prefix: str
    manifest: Manifest
    split: Split
    root: Path
    max_bad: float

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def path(self) -> Path:
        return self.root / self.digest / f"{self.split}.arrow"

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.manifest.files if name.startswith(f"{self.split}-"))


@dataclass(frozen=True)
class Copy:
    """A split in memory-mapped files. Nobody evicts it while `stream` is open: that shares a lock on the file."""

    stream: IO[bytes]
    table: pa.Table
    skipped: tuple[BadPair, ...]


def hold(source: SplitSource, damaged: Copy | None = None) -> Copy:
    """The copy of a split, fetched unless a whole one is there. Any number of processes may ask at the same time.

    Args:
        damaged: a copy found to be so. Unless someone else has replaced it since, it is fetched anew.

    Raises:
        CacheFull: there is no room for it.
        BadRows: more than `max_bad` of its rows are bad in the store.
        IntegrityError: a shard differs from its manifest.
    """
    found = _unless(_held(source.path), damaged)
    if found is None:
        source.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(source.root):
            found = _unless(_held(source.path), damaged)
            if found is None:
                source.path.unlink(missing_ok=True)
                _fetch(source)
                found = _held(source.path)
    if found is None:
        raise IntegrityError(f"{source.path} is damaged as soon as it is written: check that disk")
    _check_enough_good(source, found)
    return found


def limit_from_environment() -> float | None:
    """Bytes that all copies together may take: `KINTSUGI_CACHE_GB` (1e9 bytes each), None where it is not set.

    Then only the disk is the limit: old copies go once less than 5% of it would stay free, for then Ray stops
    spilling and everything else on the machine suffers. A fixed number would be wrong for most disks, and no limit
    at all would fill each of them in time.

    Raises:
        ConfigError: it is no number above 0.
    """
    text = os.environ.get(LIMIT, "")
    try:
        limit = float(text or "nan") * 1e9
    except ValueError:
        limit = -1.0
    if text and not limit > 0:
        raise ConfigError(f"{LIMIT}={text}: set it to a number of gigabytes above 0, or not at all")
    return limit if text else None


def _held(path: Path) -> Copy | None:
    """The copy at `path`; None where there is none, or none that is whole."""
    try:
        record = _Record.model_validate_json(path.with_suffix(".json").read_bytes())
        stream = path.open("rb")
    except (FileNotFoundError, ValidationError):
        return None
    with contextlib.ExitStack() as undo:
        undo.callback(stream.close)
        fcntl.flock(stream, fcntl.LOCK_SH)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            status = os.fstat(stream.fileno())
            if status.st_size != record.size or not os.path.samestat(status, path.stat()):
                return None
            os.utime(path)  # the time of its last use
        except (OSError, pa.ArrowException):  # evicted before it was locked, or damaged
            return None
        undo.pop_all()
        return Copy(stream, table, record.skipped)


def _unless(found: Copy | None, damaged: Copy | None) -> Copy | None:
    """`found`, if it is another file than `damaged`."""
    if found is None or damaged is None:
        return found
    one, other = (os.fstat(copy.stream.fileno()) for copy in (found, damaged))
    return None if os.path.samestat(one, other) else found


def _fetch(source: SplitSource) -> None:
    sizes = [source.manifest.files[name].size for name in source.shards]
    _make_room(source, int(sum(sizes) * _GROWTH) + max(sizes))
    with _part(source.root) as part:
        skipped = fetch_shards(source.store, source.prefix, source.manifest, source.shards, part)
        record = _Record(size=part.stat().st_size, skipped=tuple(skipped))
        write_atomically(source.path.with_suffix(".json"), record.model_dump_json(indent=1).encode())
        part.replace(source.path)


def _check_enough_good(source: SplitSource, found: Copy) -> None:
    skipped, rows = found.skipped, len(found.table) + len(found.skipped)
    if len(found.table) and len(skipped) <= source.max_bad * rows:
        return
    first = "; ".join(f"{row.name}: {row.reason}" for row in skipped[:3])
    raise BadRows(
        f"{len(skipped)} of {rows} {source.split} images in {source.store.uri}/{source.prefix} cannot be used "
        f"({first}): build the dataset again, no more than {source.max_bad:.0%} may be bad"
    )


def _make_room(source: SplitSource, needed: int) -> None:
    """Evict copies that nobody holds, those first that were used longest ago, until `needed` bytes fit."""
    limit = limit_from_environment()
    for path in sorted(_copies(source.root), key=lambda path: path.stat().st_mtime):
        if needed <= _spare(source.root, limit):
            return
        _evict(path)
    if needed > _spare(source.root, limit, kept_free=0.0):
        raise CacheFull(
            f"the {source.split} images of {source.prefix} take {needed / 1e9:.3g} GB and {_told(source.root, limit)}: "
            f"raise {LIMIT}, let KINTSUGI_CACHE name a folder on a larger disk, or end what reads other datasets"
        )


def _spare(root: Path, limit: float | None, kept_free: float = KEPT_FREE) -> float:
    if limit is not None:
        return limit - sum(path.stat().st_size for path in _copies(root))
    disk = shutil.disk_usage(root)
    return disk.free - kept_free * disk.total


def _told(root: Path, limit: float | None) -> str:
    left = _spare(root, limit, kept_free=0.0) / 1e9
    whole = f"of the {limit / 1e9:g} GB for {root}" if limit is not None else f"on the disk of {root}"
    return f"{left:.3g} GB {whole} are not in use"


def _copies(root: Path) -> Iterator[Path]:
    """Files that `_fetch` has made, by name and record; behind a link lies what belongs to someone else."""
    for folder in root.iterdir():
        if re.fullmatch("[0-9a-f]{64}", folder.name) and folder.is_dir() and not folder.is_symlink():
            for path in (folder / f"{split}.arrow" for split in SPLITS):
                if path.is_file() and not path.is_symlink() and path.with_suffix(".json").is_file():
                    yield path


def _evict(path: Path) -> None:
    """Delete a copy, unless someone holds it."""
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        path.unlink()
        path.with_suffix(".json").unlink()


@contextlib.contextmanager
def _locked(root: Path) -> Generator[None]:
    with (root / _LOCK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _part(root: Path) -> Generator[Path]:
    """A file to write to; what a fetch that was killed has left goes first."""
    folder = root / _PART
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / "part.arrow"
    finally:
        shutil.rmtree(folder)
