"""The files of a dataset: Parquet in the store, Arrow IPC in the local cache, one row for each sample."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from kintsugi.data.layouts import BadPair
from kintsugi.data.sample import RawSample, Sample, decode_sample
from kintsugi.errors import DataError
from kintsugi.manifest import Manifest, get_verified
from kintsugi.storage import ObjectStore, sha256

TEXT = ("sample_id", "part_id", "category", "defect_type", "split")
LATER = ("preset",)
"""Text that may be missing, also as a column: datasets published before it was known stay readable."""
IMAGES = ("clean", "degraded", "mask")
_NUMBERS = ("height", "width", "channels", "bit_depth", "white_level")
SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in TEXT]
    + [pa.field(name, pa.binary(), nullable=name != "clean") for name in IMAGES]
    + [pa.field(name, pa.int32(), nullable=False) for name in _NUMBERS]
    + [pa.field(f"{name}_sha256", pa.string(), nullable=name != "clean") for name in IMAGES]
    + [pa.field(name, pa.string()) for name in LATER]
)
# pyarrow's stubs know only the flag, its documentation the list of columns too.
_DICTIONARIES: Any = ["category", "defect_type", "split"]
_ROW_GROUP_BYTES = 32 << 20
_SHARD_BYTES = 256 << 20


def as_row(raw: RawSample, sample: Sample) -> dict[str, Any]:
    height, width = sample.clean.size
    row: dict[str, Any] = {name: getattr(raw, name) for name in (*TEXT, *LATER, *IMAGES)}
    row |= {f"{name}_sha256": None if row[name] is None else sha256(row[name]) for name in IMAGES}
    row |= {"height": height, "width": width, "channels": sample.clean.channels}
    return row | {"bit_depth": sample.clean.bit_depth, "white_level": sample.clean.white_level}


class ShardWriters:
    """Parquet files of one folder, a series for each split; only one row group of each is held in memory."""

    def __init__(self, folder: Path, rows_per_shard: int) -> None:
        self._folder = folder
        self._rows_per_shard = rows_per_shard
        self._open: dict[str, _ShardWriter] = {}
        self._numbers: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for writer in self._open.values():
            writer.close()

    def write(self, row: Mapping[str, Any]) -> None:
        split = row["split"]
        if split not in self._open:
            path = self._folder / f"{split}-{self._numbers[split]:05d}.parquet"
            self._open[split] = _ShardWriter(path)
            self._numbers[split] += 1
        writer = self._open[split]
        writer.write(row)
        if writer.rows >= self._rows_per_shard or writer.size >= _SHARD_BYTES:
            self._open.pop(split).close()


class _ShardWriter:
    def __init__(self, path: Path) -> None:
        # Images are compressed already; a dictionary of them would only cost memory.
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="none", use_dictionary=_DICTIONARIES)
        self._pending: list[Mapping[str, Any]] = []
        self._pending_bytes = 0
        self.rows = 0
        self.size = 0

    def write(self, row: Mapping[str, Any]) -> None:
        self._pending.append(row)
        size = sum(len(row[name] or b"") for name in IMAGES)
        self._pending_bytes += size
        self.size += size
        self.rows += 1
        if self._pending_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_pylist(self._pending, SCHEMA))
        self._pending, self._pending_bytes = [], 0


def fetch_shards(
    store: ObjectStore, prefix: str, manifest: Manifest, shards: Sequence[str], path: Path
) -> list[BadPair]:
    """Shard by shard into one Arrow file; the rows that are bad are left out and returned.

    Every image is decoded for that. It takes what an epoch of training spends on decoding, once for each machine
    and split: 54 ms for an image of 1024 x 1024 px on one busy core, 34 ms on two; hashing takes 3.
    """
    bad: list[BadPair] = []
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".kintsugi-") as scratch,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        shard = Path(scratch) / "shard.parquet"
        for name in shards:
            get_verified(store, f"{prefix}/{name}", manifest.files[name], shard)
            for table in _tables(shard):
                faults = list(pool.map(fault_of, table.to_pylist()))
                ids = table.column("sample_id").to_pylist()
                bad += [BadPair(name, fault) for name, fault in zip(ids, faults, strict=True) if fault is not None]
                writer.write_table(table.filter(pa.array([fault is None for fault in faults], pa.bool_())))
    return bad


def fault_of(row: Mapping[str, Any]) -> str | None:
    """Why a row cannot be used: an image differs from its hash or cannot be decoded; None where nothing is wrong."""
    if (fault := hash_fault(row)) is not None:
        return fault
    try:
        decode_sample(raw_of(row))
    except DataError as error:
        return str(error)
    return None


def hash_fault(row: Mapping[str, Any]) -> str | None:
    for name in IMAGES:
        if row[name] is not None and sha256(row[name]) != row[f"{name}_sha256"]:
            return f"its {name} image differs from the hash beside it"
    return None


def raw_of(row: Mapping[str, Any]) -> RawSample:
    fields: dict[str, Any] = {key: row[key] for key in (*TEXT, *IMAGES, "white_level")}
    fields.update((name, row.get(name)) for name in LATER)
    return RawSample(**fields)


def _tables(shard: Path) -> Iterator[pa.Table]:
    """The row groups of a shard, with all columns of today."""
    with pq.ParquetFile(shard) as parquet:
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group)
            for name in LATER:
                if name not in table.column_names:
                    table = table.append_column(name, pa.nulls(len(table), pa.string()))
            yield table.select(SCHEMA.names).cast(SCHEMA)
