"""ObjectStore: bytes under keys with conditional writes, and the one in memory."""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from kintsugi.errors import ObjectNotFound, PreconditionFailed, StoreError, StoreUnavailable
from kintsugi.retry import persist

T = TypeVar("T")


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing knows of an object: `size` in bytes, and a `stamp` that is another one once it was replaced."""

    key: str
    size: int
    stamp: str = field(default="", compare=False)


class ObjectStore(ABC):
    """Bytes under `/`-separated keys below one root URI.

    `put` takes at most one condition: `if_none_match` (create only) or `if_match` (an ETag that
    `get_with_etag` gave); a condition that does not hold raises PreconditionFailed.
    """

    uri: str

    @abstractmethod
    def get_with_etag(self, key: str) -> tuple[bytes, str]: ...

    @abstractmethod
    def put(
        self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
    ) -> None: ...

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]: ...

    @abstractmethod
    def size(self, key: str) -> int:
        """Of the object, in bytes, without reading it."""

    @abstractmethod
    def delete(self, key: str) -> None: ...

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Write the object to `path`, without holding it in memory where the store allows."""

    def get(self, key: str) -> bytes:
        return self.get_with_etag(key)[0]

    def get_start(self, key: str, count: int) -> bytes:
        """The object's first bytes, `count` or all that it has, without reading the rest where the store allows."""
        return self.get(key)[:count]

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except ObjectNotFound:
            return False
        return True


class MemoryStore(ObjectStore):
    """A store in this process, for tests; another process gets a copy."""

    def __init__(self, objects: Mapping[str, bytes] | None = None) -> None:
        self.uri = "memory://"
        self._objects = dict(objects or {})
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["MemoryStore"], tuple[dict[str, bytes]]]:
        return MemoryStore, (self._objects,)

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        data = self._object(key)
        return data, sha256(data)

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        body = data if isinstance(data, bytes) else data.read_bytes()
        with self._lock:
            check_condition(self._objects.get(checked_key(key)), key, if_none_match, if_match)
            self._objects[key] = body

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = checked_prefix(prefix)
        with self._lock:
            found = {key: data for key, data in self._objects.items() if key.startswith(start)}
        for key in sorted(found):
            yield ObjectInfo(key, len(found[key]), sha256(found[key]))

    def size(self, key: str) -> int:
        return len(self._object(key))

    def delete(self, key: str) -> None:
        self._objects.pop(checked_key(key), None)

    def download(self, key: str, path: Path) -> None:
        path.write_bytes(self._object(key))

    def _object(self, key: str) -> bytes:
        try:
            return self._objects[checked_key(key)]
        except KeyError:
            raise ObjectNotFound(missing(self.uri, key)) from None


def create(store: ObjectStore, key: str, data: bytes | Path, look: Callable[[], T], *, seconds: float) -> T | None:
    """None where `data` is the object now; else what `look` says of the one that was there first.

    Tried for `seconds`. After a lost answer the object that is found may be the one that was sent.
    """

    def once() -> T | None:
        try:
            store.put(key, data, if_none_match=True)
        except PreconditionFailed:
            return look()
        return None

    # S3 also refuses one of two that write at the same time (409), and the other may not be done yet, or fail.
    return persist(lambda: persist(once, ObjectNotFound, seconds=seconds, first=0.1), StoreUnavailable, seconds=seconds)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def checked_key(key: str) -> str:
    """The key itself, if it stays below the store's root."""
    if not key or key.startswith("/") or any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise StoreError(f"{key!r} is not a key: use names separated by single slashes, without '..'")
    return key


def checked_prefix(prefix: str) -> str:
    """The start of a key: empty, or a key that may end in a slash."""
    if prefix:
        checked_key(prefix.removesuffix("/"))
    return prefix


def missing(uri: str, key: str) -> str:
    return f"there is no {uri}/{key}"


def changed(key: str) -> str:
    return f"{key} was changed by someone else: read it again"


def check_condition(current: bytes | None, key: str, if_none_match: bool, if_match: str | None) -> None:
    if if_none_match and current is not None:
        raise PreconditionFailed(f"{key} exists already")
    if if_match is not None and (current is None or sha256(current) != if_match):
        raise PreconditionFailed(changed(key))
