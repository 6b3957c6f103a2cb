"""Batches: every image under one prefix restored below another, with a ledger of one line an image.

batches/<tenant>/index/<id>.json                       what was asked for: the same request is the same batch
batches/<tenant>/<id>/inputs/<sha256>.jsonl            listings, sorted by key
batches/<tenant>/<id>/<round>/plan.json                what this round restores
                             /tries/                   what was begun
                             /ledger/part-<n>.jsonl    the lines of a block of images, written when it is done
                             /ledger.jsonl             one line an image, of this and all earlier rounds
                             /done.json                totals, written last

Every object is created once and stays as it is, save `<id>/stopped.json`, which says why the last run ended early.

A batch that is asked for again goes on with its unfinished round, as that was planned. One that is done begins another
round, if there is anything for it: images that are new, were replaced, whose result is gone, that failed, or whose
output held something else. What was refused for its own sake is not tried again.
"""

import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kintsugi.errors import ConfigError, IntegrityError, ObjectNotFound
from kintsugi.storage import ObjectStore, open_store, sha256
from kintsugi_serve.jobs import LoadedModel
from kintsugi_serve.objects.places import RESERVED

Outcome = Literal["restored", "kept", "refused", "failed"]
State = Literal["running", "stopped", "done"]
Stored = TypeVar("Stored", bound=BaseModel)

READERS = 16
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID = re.compile(r"[0-9a-f]{16}")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BatchRequest(_Record):
    """Body of POST /v1/batches."""

    input: str = Field(description="s3://bucket/prefix: every image below it")
    output: str = Field(description="s3://bucket/prefix: where the results go, under the same names")
    white_level: int | None = Field(default=None, ge=1, le=65535, description="value of full scale of every image")
    model: str | None = Field(default=None, min_length=1, description="NAME@ALIAS, NAME@NUMBER or NAME")


class Batch(_Record):
    """What was asked for. `model` is NAME@NUMBER."""

    tenant: str
    input: str
    output: str
    model: str
    digest: str
    white_level: int | None
    created: str

    @property
    def id(self) -> str:
        """16 hex digits that follow from all but the names of the model and the time."""
        asked = self.model_dump(exclude={"model", "created"})
        return sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode())[:16]


class Line(_Record):
    """What became of one image: a line of the ledger.

    `kept`: the output held the same bytes already. `refused`: for a reason that lies in the image, or in what lies at
    its output; `failed`: for another. `code` is that of an ImageError, `bad_key`, `missing`, `conflict`, `poison`,
    `store_failed`, `store_unavailable`, `unavailable` (no room on a disk) or `internal`. `size` in bytes and
    `stamp` as listed, see `ObjectInfo`; `ms` from reading to written.
    """

    key: str
    size: int
    stamp: str = ""
    status: Outcome
    code: str | None = None
    detail: str | None = None
    input_sha256: str | None = None
    output: str | None = None
    output_sha256: str | None = None
    digest: str
    retention: float | None = None
    alarm: bool = False
    abstained: str | None = None
    ms: float = 0.0


class Counts(_Record):
    """How many images ended how; `alarms` are among the restored and kept."""

    restored: int = 0
    kept: int = 0
    refused: int = 0
    failed: int = 0
    alarms: int = 0

    @property
    def total(self) -> int:
        return self.restored + self.kept + self.refused + self.failed

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = self.model_dump(), other.model_dump()
        return Counts(**{name: mine[name] + theirs[name] for name in mine})

    @staticmethod
    def of(lines: Iterable[Line]) -> "Counts":
        found = dict.fromkeys(Counts.model_fields, 0)
        for line in lines:
            found[line.status] += 1
            found["alarms"] += line.alarm
        return Counts(**found)


class Plan(_Record):
    """What one round restores: `total` images in blocks of `block`, listed in `inputs` (SHA-256 of each part).

    `carried` counts the lines of earlier rounds that still hold.
    """

    round: int
    total: int
    block: int
    inputs: tuple[str, ...]
    carried: Counts
    created: str


class Done(_Record):
    """The end of a round: totals of its ledger, which holds the earlier rounds too."""

    totals: Counts
    ledger_sha256: str
    finished: str


class Stopped(_Record):
    detail: str
    at: str


class Progress(_Record):
    """How far a batch is. `total` and `remaining` are null until its images are listed; `ledger` is its address."""

    id: str
    status: State
    input: str
    output: str
    model: str
    digest: str
    white_level: int | None
    created: str
    round: int
    total: int | None
    restored: int
    kept: int
    refused: int
    failed: int
    alarms: int
    remaining: int | None
    ledger: str | None
    detail: str | None = Field(description="why it stopped")


@dataclass(frozen=True, slots=True)
class Input:
    """An object to restore, number `number` of its plan; see `ObjectInfo`."""

    number: int
    key: str
    size: int
    stamp: str = ""


def make_batch(
    store_uri: str, tenant: str, input: str, output: str, model: LoadedModel, white_level: int | None = None
) -> Batch:
    """The batch that a request stands for; reads nothing.

    Raises:
        ConfigError: input and output overlap, or one of them holds or lies among the store's own objects.
    """
    source, target, own = (open_store(uri).uri for uri in (input, output, store_uri))
    if _within(source, target) or _within(target, source):
        raise ConfigError(f"{target} and {source} lie one within the other: give an output beside the input")
    if _within(own, source):
        raise ConfigError(f"{source} holds the store's own objects: give a prefix below it")
    if _within(own, target) or any(_within(target, f"{own}/{name}") for name in RESERVED):
        raise ConfigError(f"{target} holds the store's own objects: give another output")
    return Batch(
        tenant=_checked(_TENANT, tenant, "tenant"), input=source, output=target, model=model.label,
        digest=model.digest, white_level=white_level, created=now(),
    )  # fmt: skip


def _within(inner: str, outer: str) -> bool:
    return f"{inner}/".startswith(f"{outer.rstrip('/')}/")


def _checked(pattern: re.Pattern[str], value: str, name: str) -> str:
    if not pattern.fullmatch(value):
        raise ConfigError(f"{value!r} is no {name} of a batch: {name}s match {pattern.pattern}")
    return value


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def load_batch(store: ObjectStore, tenant: str, id: str) -> Batch:
    """What was asked for under that id.

    Raises:
        ObjectNotFound: the tenant has no such batch.
    """
    if not _ID.fullmatch(id):
        raise ObjectNotFound(f"{id!r} is no id of a batch: it has 16 hex digits")
    key = f"batches/{_checked(_TENANT, tenant, 'tenant')}/index/{id}.json"
    try:
        return read(store, key, Batch)
    except ObjectNotFound as error:
        raise ObjectNotFound(f"there is no batch {id}: begin it with its input and output") from error


def list_batches(store: ObjectStore, tenant: str) -> list[Batch]:
    """All batches of a tenant, newest first."""
    prefix = f"batches/{_checked(_TENANT, tenant, 'tenant')}/index/"
    keys = [info.key for info in store.list(prefix)]
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(lambda key: read(store, key, Batch), keys))
    return sorted(found, key=lambda batch: (batch.created, batch.id), reverse=True)


def jsonl(lines: Iterable[Line]) -> bytes:
    return "".join(f"{line.model_dump_json()}\n" for line in lines).encode()


def parse_lines(body: bytes) -> Iterator[Line]:
    """The lines of a ledger or of a part of one.

    Raises:
        IntegrityError: one of them is damaged.
    """
    try:
        for line in body.splitlines():
            yield Line.model_validate_json(line)
    except ValidationError as error:
        raise IntegrityError("a ledger of a batch is damaged: begin the batch with another output") from error


def as_json(record: BaseModel) -> bytes:
    return record.model_dump_json(indent=1).encode()


def read(store: ObjectStore, key: str, kind: type[Stored]) -> Stored:
    try:
        return kind.model_validate_json(store.get(key))
    except ValidationError as error:
        raise IntegrityError(f"{store.uri}/{key} is damaged: begin the batch with another output") from error
