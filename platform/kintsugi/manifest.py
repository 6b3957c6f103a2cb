"""Folders in a store that nobody can see half of.

Every write of more than one object goes through `put_folder`, which writes a manifest (sizes, SHA-256)
last; `get_folder` reads nothing that no manifest names and checks every hash before it hands a file over.
"""

import hashlib
import math
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from kintsugi.errors import IntegrityError, ObjectNotFound
from kintsugi.retry import persist
from kintsugi.storage import ObjectStore, checked_key, sha256, write_atomically

MANIFEST = "manifest.json"
TRANSFERS = 3


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    sha256: str


class Manifest(BaseModel):
    """The last object of a folder: what it holds, and what else is worth knowing of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str
    created: str
    files: dict[str, FileEntry]
    meta: dict[str, JsonValue] = {}

    @property
    def digest(self) -> str:
        """SHA-256 over the names and hashes of the files: the identity of the content."""
        lines = "".join(f"{name} {self.files[name].sha256}\n" for name in sorted(self.files))
        return sha256(lines.encode())


def make_manifest(folder: Path, kind: str, meta: Mapping[str, JsonValue] | None = None) -> Manifest:
    """Hash every file below `folder`."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(size=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Manifest(kind=kind, created=created, files=files, meta=dict(meta or {}))


def put_folder(store: ObjectStore, prefix: str, folder: Path, manifest: Manifest, *, create_only: bool = False) -> None:
    """Upload the files that `manifest` names, then the manifest.

    Raises:
        PreconditionFailed: `create_only` and another writer took the prefix first.
    """
    for name in manifest.files:
        store.put(f"{prefix}/{name}", folder / name, if_none_match=create_only)
    store.put(f"{prefix}/{MANIFEST}", manifest.model_dump_json(indent=1).encode(), if_none_match=create_only)


def read_manifest(store: ObjectStore, prefix: str) -> Manifest:
    """The manifest under `prefix`.

    Raises:
        ObjectNotFound: none is there, so the folder was never completed.
    """
    try:
        return Manifest.model_validate_json(store.get(f"{prefix}/{MANIFEST}"))
    except ValidationError as error:
        raise IntegrityError(f"{store.uri}/{prefix}/{MANIFEST} is damaged: publish it again") from error


def get_folder(store: ObjectStore, prefix: str, folder: Path) -> Manifest:
    """Download a published folder and verify every file.

    Raises:
        IntegrityError: a file is missing or differs from the manifest.
    """
    manifest = read_manifest(store, prefix)
    for name in manifest.files:
        get_verified(store, f"{prefix}/{name}", manifest.files[name], folder / checked_key(name))
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest


def get_verified(store: ObjectStore, key: str, entry: FileEntry, path: Path) -> None:
    """Download one file; it appears at `path` only if its size and hash are right. A torn transfer is begun anew.

    Raises:
        IntegrityError: the object is missing, or came `TRANSFERS` times with other bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".kintsugi-") as scratch:
        part = Path(scratch) / "part"

        def transfer() -> None:
            store.download(key, part)
            check_file(part, entry, f"{store.uri}/{key}")

        try:
            persist(transfer, IntegrityError, seconds=math.inf, tries=TRANSFERS, first=0.1)
        except ObjectNotFound as error:
            raise IntegrityError(f"{store.uri}/{key} is missing though its manifest names it: publish again") from error
        part.replace(path)


def check_file(path: Path, entry: FileEntry, name: str) -> None:
    """Raise IntegrityError unless the file has the size and the SHA-256 of its manifest entry."""
    if not path.is_file() or path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
        raise IntegrityError(f"{name} differs from its manifest: it was damaged or changed, fetch or publish it again")


def sha256_of(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
