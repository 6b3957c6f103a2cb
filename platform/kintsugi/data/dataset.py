"""Datasets in the object store: Parquet shards of encoded images under `datasets/<name>/<digest>`.

The digest is the content: the same images always build the same dataset. A reader works on a local,
memory-mapped copy (`cache.py`, `reader.py`) in which every image is checked against the SHA-256 of its row.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from kintsugi.data.cache import SplitSource
from kintsugi.data.degradation import PRESETS, generator_for
from kintsugi.data.layouts import SPLITS, BadPair, check, read_unchecked
from kintsugi.data.reader import SplitReader
from kintsugi.data.sample import RawSample, Sample
from kintsugi.data.shards import ShardWriters, as_row
from kintsugi.errors import DataError
from kintsugi.manifest import MANIFEST, Manifest, make_manifest, put_folder, read_manifest
from kintsugi.pictures import overlay, picture_grid
from kintsugi.sections import Split
from kintsugi.storage import ObjectStore, cache_folder, sha256

ROOT = "datasets"
REPORT = "report.json"
Fractions = tuple[float, float, float]


class Counts(BaseModel):
    """Images by split, category and defect type."""

    model_config = ConfigDict(frozen=True)
    splits: dict[str, int]
    categories: dict[str, int]
    defects: dict[str, int]


class BuildReport(BaseModel):
    """What `build_dataset` made: `ref` names it, `reused` if the same content was there already."""

    model_config = ConfigDict(frozen=True)
    name: str
    digest: str
    ref: str
    reused: bool
    samples: int
    parts: int
    counts: Counts
    bad: tuple[BadPair, ...]


class DatasetSummary(BaseModel):
    """What a published dataset holds.

    `bytes` is the size of its shards, `smallest_side` that of its smallest image, px; older datasets do not tell it.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    digest: str
    ref: str
    created: str
    layout: str
    samples: int
    parts: int
    bad: int
    bytes: int
    smallest_side: int | None = None
    counts: Counts


def build_dataset(
    layout: str,
    folder: Path,
    name: str,
    store: ObjectStore,
    *,
    part_pattern: str | None = None,
    fractions: Fractions = (0.8, 0.1, 0.1),
    rows_per_shard: int = 512,
    max_bad: float = 0.01,
) -> BuildReport:
    """Read a folder, check every pair, split by part and publish.

    Args:
        part_pattern: a regular expression whose group 1 (else whole match) in the sample id is the part id.
        fractions: shares of train, val and test among parts whose split the layout does not give. A part's
            split follows from its id alone, so adding data moves no part.
        max_bad: share of pairs that may be set aside.

    Raises:
        DataError: the layout does not fit, a part lies in two splits, too many pairs are bad, none is good.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise DataError(f"'{name}' cannot name a dataset: use letters, digits, dots, dashes and underscores")
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"the shares of train, val and test must be 0 or more and sum to 1 (got {fractions})")
    intake = _Intake(_compiled(part_pattern), fractions)
    with tempfile.TemporaryDirectory(prefix="kintsugi-") as scratch:
        built = Path(scratch)
        with ShardWriters(built, rows_per_shard) as writers:
            for row in intake.rows(read_unchecked(layout, folder)):
                writers.write(row)
        report = intake.report(layout)
        _check_enough_good(intake, folder, report, max_bad)
        (built / REPORT).write_text(report)
        return _publish(store, built, name, layout, intake)


def resolve_dataset(store: ObjectStore, ref: str) -> tuple[str, Manifest]:
    """The prefix and the manifest of `name` (the one built last) or `name@digest` (the start of it is enough).

    Raises:
        DataError: there is no such dataset, or several fit; the message names those that exist.
    """
    name, _, wanted = ref.partition("@")
    found = {
        prefix: read_manifest(store, prefix)
        for prefix in _published(store, f"{ROOT}/{name}/")
        if prefix.rpartition("/")[2].startswith(wanted)
    }
    if not found:
        known = sorted({_ref(*prefix.split("/")[1:]) for prefix in _published(store, f"{ROOT}/")})
        there = f"there are {', '.join(known)}" if known else "the store has none: run 'kintsugi data build'"
        raise DataError(f"there is no dataset '{ref}': {there}")
    if wanted and len(found) > 1:
        raise DataError(f"'{ref}' fits several datasets: write more of the digest ({', '.join(sorted(found))})")
    return max(found.items(), key=lambda item: (str(item[1].meta.get("built", item[1].created)), item[0]))


def inspect_dataset(store: ObjectStore, ref: str) -> DatasetSummary:
    """What the dataset holds, from its manifest alone."""
    prefix, manifest = resolve_dataset(store, ref)
    _, name, digest = prefix.split("/")
    size = sum(entry.size for entry in manifest.files.values())
    return DatasetSummary.model_validate(
        {**manifest.meta, "digest": digest, "ref": _ref(name, digest), "created": manifest.created, "bytes": size}
    )


def open_split(
    store: ObjectStore, ref: str, split: Split, cache: Path | None = None, *, max_bad: float = 0.01
) -> SplitReader:
    """Fetch one split into the local cache, unless it is there, and map it into memory.

    `cache` defaults to `storage.cache_folder()`. Processes may do this at the same time. Splits that nobody reads
    make room for it, see `kintsugi.data.cache`.

    Args:
        max_bad: share of rows that may be bad in the store; they are left out and named in `skipped`.

    Raises:
        DataError: no such dataset, or it has no images in that split.
        BadRows: more than `max_bad` of them are bad.
        CacheFull: there is no room for it.
        IntegrityError: a shard differs from its manifest.
    """
    prefix, manifest = resolve_dataset(store, ref)
    source = SplitSource(store, prefix, manifest, split, (cache or cache_folder()) / ROOT, max_bad)
    if not source.shards:
        raise DataError(f"dataset '{ref}' has no {split} images: build it with more parts or other fractions")
    return SplitReader(source)


def contact_sheet(store: ObjectStore, ref: str, path: Path, count: int = 24, cache: Path | None = None) -> Path:
    """A PNG of `count` samples spread over the splits: degraded, clean, and clean with the defect outlined.

    Where the dataset gives no degraded image, the preset `kla` makes one.
    """
    _, manifest = resolve_dataset(store, ref)
    splits: list[Split] = [s for s in SPLITS if any(name.startswith(f"{s}-") for name in manifest.files)]
    readers = [(s, open_split(store, ref, s, cache)) for s in splits]
    places = [(split, reader, index) for split, reader in readers for index in range(len(reader))]
    shown = [places[i * len(places) // min(count, len(places))] for i in range(min(count, len(places)))]
    tiles = [_tiles(split, reader.sample(index)) for split, reader, index in shown]
    across = min(3, len(tiles))
    rows = [[image for images, _ in tiles[i : i + across] for image in images] for i in range(0, len(tiles), across)]
    captions = [[text for _, texts in tiles[i : i + across] for text in texts] for i in range(0, len(tiles), across)]
    return picture_grid(rows, ["degraded", "clean", "defect"] * across, [], path, captions=captions)


def _tiles(split: str, sample: Sample) -> tuple[list[Any], list[str]]:
    clean = sample.clean.to_unit()
    if sample.degraded is not None:
        degraded, source = sample.degraded.to_unit(), "given"
    else:
        generator = generator_for(0, "contact sheet", sample.sample_id)
        degraded, source = PRESETS["kla"](clean, generator, sample.clean.white_level), "preset kla"
    size = f"{sample.clean.size[1]} x {sample.clean.size[0]}, {sample.clean.bit_depth} bit"
    return [degraded, clean, overlay(clean, sample.mask)], [f"{split}: {source}", size, sample.defect_type]


@dataclass
class _Intake:
    """Turns samples into rows, and keeps account of what it saw."""

    part_pattern: re.Pattern[str] | None
    fractions: Fractions
    bad: list[BadPair] = field(default_factory=list)
    splits: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    defects: Counter[str] = field(default_factory=Counter)
    parts: dict[str, Split] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    images: dict[str, tuple[str, Split]] = field(default_factory=dict)
    smallest_side: int | None = None

    @property
    def good(self) -> int:
        return self.splits.total()

    def rows(self, samples: Iterator[RawSample | BadPair]) -> Iterator[dict[str, Any]]:
        for raw in samples:
            row = raw if isinstance(raw, BadPair) else self._row(raw)
            if isinstance(row, BadPair):
                self.bad.append(row)
            else:
                yield row

    def report(self, layout: str) -> str:
        bad = [{"name": pair.name, "reason": pair.reason} for pair in self.bad]
        return json.dumps({"layout": layout, "good": self.good, "bad": bad}, indent=1)

    def counts(self) -> Counts:
        splits, categories, defects = (dict(sorted(c.items())) for c in (self.splits, self.categories, self.defects))
        return Counts(splits=splits, categories=categories, defects=defects)

    def _row(self, raw: RawSample) -> dict[str, Any] | BadPair:
        sample = check(raw)
        if isinstance(sample, BadPair):
            return sample
        if raw.sample_id in self.ids:
            return BadPair(raw.sample_id, "another image has the same id")
        raw = replace(raw, part_id=_part_id(raw, self.part_pattern))
        split = raw.split or _split_of(raw.part_id, self.fractions)
        if self.parts.setdefault(raw.part_id, split) != split:
            raise DataError(
                f"part '{raw.part_id}' is in {self.parts[raw.part_id]} and in {split}, so scores would flatter: "
                "move all its images into one split"
            )
        twin, twin_split = self.images.setdefault(sha256(raw.clean), (raw.sample_id, split))
        if twin_split != split:
            return BadPair(raw.sample_id, f"the same image is in {twin_split} already, as {twin}")
        self.ids.add(raw.sample_id)
        for counter, key in ((self.splits, split), (self.categories, raw.category), (self.defects, raw.defect_type)):
            counter[key] += 1
        self.smallest_side = min(*sample.clean.size, self.smallest_side or sys.maxsize)
        return as_row(replace(raw, split=split), sample)


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise DataError(f"the part pattern '{pattern}' is not a regular expression ({error})") from error


def _part_id(raw: RawSample, pattern: re.Pattern[str] | None) -> str:
    if pattern is None:
        return raw.part_id
    match = pattern.search(raw.sample_id)
    if match is None:
        raise DataError(f"the part pattern '{pattern.pattern}' finds no part in '{raw.sample_id}': widen it")
    return match.group(1) if pattern.groups else match.group(0)


def _split_of(part_id: str, fractions: Fractions) -> Split:
    place = int.from_bytes(hashlib.sha256(part_id.encode()).digest()[:8], "big") / 2**64
    if place < fractions[0]:
        return "train"
    return "val" if place < fractions[0] + fractions[1] or fractions[2] == 0 else "test"


def _check_enough_good(intake: _Intake, folder: Path, report: str, max_bad: float) -> None:
    total = intake.good + len(intake.bad)
    if intake.good and len(intake.bad) <= max_bad * total:
        return
    if not total:
        raise DataError(f"{folder} holds no image: check the path and the layout")
    handle, path = tempfile.mkstemp(prefix="kintsugi-report-", suffix=".json")
    with os.fdopen(handle, "w") as stream:
        stream.write(report)
    first = "; ".join(f"{pair.name}: {pair.reason}" for pair in intake.bad[:3])
    raise DataError(
        f"{len(intake.bad)} of {total} pairs in {folder} cannot be used ({first}): correct them, "
        f"all are listed in {path}, or allow more than {max_bad:.0%} bad ones"
    )


def _publish(store: ObjectStore, built: Path, name: str, layout: str, intake: _Intake) -> BuildReport:
    counts, samples, parts = intake.counts(), intake.good, len(intake.parts)
    found = {"samples": samples, "parts": parts, "bad": len(intake.bad), "smallest_side": intake.smallest_side}
    meta = {"name": name, "layout": layout, **found}
    built_at = datetime.now(UTC).isoformat(timespec="microseconds")
    manifest = make_manifest(built, "dataset", {**meta, "counts": counts.model_dump(), "built": built_at})
    digest = manifest.digest
    prefix = f"{ROOT}/{name}/{digest}"
    reused = store.exists(f"{prefix}/{MANIFEST}")
    if reused:
        # Only the time changes: the bare name means what was built last.
        store.put(f"{prefix}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())
    else:
        put_folder(store, prefix, built, manifest)
    return BuildReport(
        name=name, digest=digest, ref=_ref(name, digest), reused=reused,
        samples=samples, parts=parts, counts=counts, bad=tuple(intake.bad),
    )  # fmt: skip


def _ref(name: str, digest: str) -> str:
    return f"{name}@{digest[:12]}"


def _published(store: ObjectStore, prefix: str) -> list[str]:
    return [info.key.removesuffix(f"/{MANIFEST}") for info in store.list(prefix) if info.key.endswith(f"/{MANIFEST}")]
