"""The S3 objects that a request may touch: only those plainly below its caller's prefixes."""

import threading
from collections.abc import Callable, Iterable

from kintsugi.errors import ObjectNotFound
from kintsugi.storage import ObjectStore, create, open_store
from kintsugi_serve.access.addresses import S3Address, area_of, is_below, is_plain
from kintsugi_serve.objects.results import CREATE_S
from kintsugi_serve.schemas import Refusal

RESERVED = ("models", "datasets", "runs", "results", "batches")
"""Areas of the store in which requests write nothing; results and batches are the service's own."""


def allowed_address(uri: str, prefixes: Iterable[str]) -> S3Address:
    """The prefix that holds `uri`, and the key under it.

    Raises:
        Refusal: `forbidden`, for every address that is not plainly below a prefix.
    """
    if not is_plain(uri):
        raise Refusal("forbidden", "the address must be plain: s3://bucket/key, without '..', '//', '%', '@' or '\\'")
    for prefix in prefixes:
        if is_below(uri, prefix):
            root = prefix.rstrip("/")
            return S3Address(root, uri[len(root) + 1 :])
    raise Refusal("forbidden", "the address is outside the places that this key may use")


def writable_address(uri: str, prefixes: Iterable[str], store_uri: str) -> S3Address:
    """As `allowed_address`, and not among the areas of the store that are `RESERVED`."""
    address = allowed_address(uri, prefixes)
    area = area_of(uri, store_uri, RESERVED)
    if area is not None:
        raise Refusal("forbidden", f"nothing can be written below {area}/ of the store: choose another place")
    return address


class Places:
    """Reads and writes at allowed addresses, all in the one S3 that the environment names.

    Args:
        store_uri: the store, whose own areas stay closed to writers.
        open_root: a store for a prefix; called once for each, when it is first needed.
        max_bytes: of an object that is read.
    """

    def __init__(
        self, store_uri: str, open_root: Callable[[str], ObjectStore] = open_store, *, max_bytes: int = 64 * 2**20
    ) -> None:
        self._store_uri = store_uri
        self._open_root = open_root
        self._max_bytes = max_bytes
        self._stores: dict[str, ObjectStore] = {}
        self._lock = threading.Lock()

    def readable(self, uri: str, prefixes: Iterable[str]) -> S3Address:
        """See `allowed_address`."""
        return allowed_address(uri, prefixes)

    def writable(self, uri: str, prefixes: Iterable[str]) -> S3Address:
        """See `writable_address`."""
        return writable_address(uri, prefixes, self._store_uri)

    def read(self, address: S3Address) -> bytes:
        """The object's bytes; its size is looked at first.

        Raises:
            Refusal: `not_found` or `too_large`.
        """
        store = self._opened(address.root)
        try:
            size = store.size(address.key)
            if size > self._max_bytes:
                raise Refusal("too_large", f"{address.uri} has {size} bytes, more than {self._max_bytes}")
            return store.get(address.key)
        except ObjectNotFound:
            raise Refusal("not_found", f"there is no {address.uri}") from None

    def write_once(self, address: S3Address, data: bytes) -> bool:
        """Whether the object is new; False where the same bytes were there. Never overwrites other bytes.

        Raises:
            Refusal: `conflict`, where other bytes are there.
        """
        store, key = self._opened(address.root), address.key

        def is_same() -> bool:
            return store.size(key) == len(data) and store.get(key) == data

        same = create(store, key, data, is_same, seconds=CREATE_S)
        if same is False:
            raise Refusal("conflict", f"{address.uri} holds something else: choose another")
        return same is None

    def _opened(self, root: str) -> ObjectStore:
        with self._lock:
            if root not in self._stores:
                self._stores[root] = self._open_root(root)
            return self._stores[root]
