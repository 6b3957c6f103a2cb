"""Results under the address of what they were made from: the input, the model and the parameters.

A result is one object, the restored file. What is known of it, its facts, is a second one beside it whose name holds
the SHA-256 of the file. The facts are written first, so that whoever finds a file finds its facts, and a writer that
died between the two leaves nothing that a later one could take for a result.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from kintsugi.errors import IntegrityError, ObjectNotFound, StoreError
from kintsugi.storage import ObjectStore, create, sha256
from kintsugi_serve.access.keys import TENANT
from kintsugi_serve.jobs import Answer

AREA = "results"
_KEY = re.compile(rf"{AREA}/{TENANT}(/[0-9a-f]{{64}}){{3}}")
CREATE_S = 10.0


@dataclass(frozen=True)
class StoredResult:
    """A result as it lies in the store; `image` is the restored file."""

    key: str
    uri: str
    image: bytes
    facts: dict[str, Any]


@dataclass(frozen=True)
class StoredFile:
    """A result of which a copy lies in a file, as it is too large to be held."""

    key: str
    uri: str
    path: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Content:
    """What tells one file from another: its SHA-256, and its size in bytes."""

    sha256: str
    size: int

    @staticmethod
    def of(data: bytes | Path) -> "Content":
        """Of bytes, or of what a file holds, which is read piece by piece."""
        if isinstance(data, bytes):
            return Content(sha256(data), len(data))
        with data.open("rb") as stream:
            return Content(hashlib.file_digest(stream, "sha256").hexdigest(), data.stat().st_size)


class _Record(BaseModel):
    """The facts as an object, with what tells damage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_sha256: str
    image_bytes: int
    facts_sha256: str
    facts: dict[str, Any]


class Results:
    """The results in one store; a write is tried for `seconds` while the store does not answer."""

    def __init__(self, store: ObjectStore, *, seconds: float = CREATE_S) -> None:
        self._store = store
        self._seconds = seconds

    def find(self, key: str) -> StoredResult | None:
        """The result under `key`, or None.

        Raises:
            IntegrityError: file or facts are not what was written.
        """
        try:
            image = self._store.get(_checked(key))
        except ObjectNotFound:
            return None
        return self._with_facts(key, image)

    def keep(self, key: str, image: bytes, facts: Mapping[str, Any]) -> tuple[StoredResult, bool]:
        """The result that lies under `key` from now on, and whether it is this one.

        The first to come wins, also over other bytes: all who keep the same key get the same result.

        Args:
            facts: what JSON can hold.

        Raises:
            IntegrityError: what was there is damaged.
        """
        known = self._note(key, Content.of(image), facts)
        there = self._create(key, image)
        if there is not None and there != image:
            return self._with_facts(key, there), False
        return StoredResult(key, self._uri(key), image, known), there is None

    def find_file(self, key: str, path: Path) -> StoredFile | None:
        """As `find`; the restored file is written to `path`."""
        try:
            self._store.download(_checked(key), path)
        except ObjectNotFound:
            return None
        return StoredFile(key, self._uri(key), path, self._facts(key, Content.of(path)))

    def keep_file(self, key: str, path: Path, facts: Mapping[str, Any]) -> tuple[StoredFile, bool]:
        """As `keep`, of the file at `path`; where another one came first, it lies beside that now."""
        content, aside = Content.of(path), path.with_name(f"{path.name}-first")
        known = self._note(key, content, facts)
        there = create(self._store, key, path, lambda: content_at(self._store, key, aside), seconds=self._seconds)
        if there is not None and there != content:
            return StoredFile(key, self._uri(key), aside, self._facts(key, there)), False
        return StoredFile(key, self._uri(key), path, known), there is None

    def _note(self, key: str, content: Content, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write the facts of a file that is not there yet; those that are its facts from now on."""
        record = _encoded(content, facts)
        earlier = self._create(_facts_key(_checked(key), content), record)
        return self._read(key, content, record if earlier is None else earlier)

    def _create(self, key: str, data: bytes) -> bytes | None:
        return create(self._store, key, data, lambda: self._store.get(key), seconds=self._seconds)

    def _with_facts(self, key: str, image: bytes) -> StoredResult:
        return StoredResult(key, self._uri(key), image, self._facts(key, Content.of(image)))

    def _facts(self, key: str, content: Content) -> dict[str, Any]:
        try:
            record = self._store.get(_facts_key(key, content))
        except ObjectNotFound:
            raise IntegrityError(
                f"{self._uri(key)} is damaged, it has no facts that fit: delete it, then ask again"
            ) from None
        return self._read(key, content, record)

    def _read(self, key: str, content: Content, record: bytes) -> dict[str, Any]:
        uri = self._uri(key)
        try:
            read = _Record.model_validate(json.loads(record))
        except ValueError:  # of JSON, of UTF-8, or of pydantic
            raise IntegrityError(f"the facts of {uri} are damaged: delete both, then ask again") from None
        fits = Content(read.image_sha256, read.image_bytes) == content
        if not fits or read.facts_sha256 != digest_of(read.facts):
            raise IntegrityError(f"{uri} and its facts do not fit together: delete both, then ask again")
        return read.facts

    def _uri(self, key: str) -> str:
        return f"{self._store.uri}/{key}"


def result_key(tenant: str, input_sha256: str, model_digest: str, params: Mapping[str, str | int | bool | None]) -> str:
    """Where in the store the result of this question lies.

    Args:
        params: what else the answer depends on; one that is None counts as one that is not there, so that a later
            version can have more of them and find what an earlier one kept.
    """
    given = {name: value for name, value in params.items() if value is not None}
    return _checked(f"{AREA}/{tenant}/{input_sha256}/{model_digest}/{digest_of(given)}")


def digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON document in its one canonical form: names sorted, no spaces, ASCII."""
    return sha256(_canonical(document))


def result_facts(answer: Answer) -> dict[str, Any]:
    """What is kept beside a result."""
    return {
        "model": answer.model.label,
        "digest": answer.model.digest,
        "input_sha256": answer.input_sha256,
        "output_sha256": answer.output_sha256,
        "retention": f"{answer.retention:.4f}",
        "alarm": "true" if answer.alarm else "false",
        "report": answer.report,
    }


def content_at(store: ObjectStore, key: str, path: Path) -> Content:
    """Of an object, of which a copy is at `path` then."""
    store.download(key, path)
    return Content.of(path)


def _encoded(content: Content, facts: Mapping[str, Any]) -> bytes:
    told = json.loads(_canonical(facts))
    record = {"image_sha256": content.sha256, "image_bytes": content.size, "facts_sha256": digest_of(told)}
    return _canonical({**record, "facts": told})


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _facts_key(key: str, content: Content) -> str:
    return f"{key}.{content.sha256}.json"


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise StoreError(f"{key!r} is not the key of a result: make it with result_key from a tenant and SHA-256s")
    return key
