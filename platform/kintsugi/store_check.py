"""Whether a store keeps its word on conditional writes, on which versions, aliases and ledgers rest."""

import contextlib
import uuid
from collections.abc import Callable

from kintsugi.errors import PreconditionFailed, StoreError, StoreUnavailable
from kintsugi.objects import ObjectStore

PREFIX = "selftest-"


def fault(store: ObjectStore) -> str | None:
    """What is wrong with the store's conditional writes; None where nothing is.

    Five small requests on an object of a new name, which is deleted again.

    Raises:
        StoreError: the store takes no writes from us, or does not answer.
    """
    key = f"{PREFIX}{uuid.uuid4().hex}"
    try:
        return _fault(store, key)
    except PreconditionFailed as error:
        # A first answer was lost, and botocore's second try met what the first had written.
        raise StoreUnavailable(f"{store.uri} answered no conditional write clearly: try again") from error
    finally:
        with contextlib.suppress(StoreError):
            store.delete(key)


def _fault(store: ObjectStore, key: str) -> str | None:
    store.put(key, b"first", if_none_match=True)
    if _takes(lambda: store.put(key, b"second", if_none_match=True)):
        return "it lets a second writer replace an object that was to be created once (If-None-Match is ignored)"
    _, etag = store.get_with_etag(key)
    if not _takes(lambda: store.put(key, b"third", if_match=etag)):
        return "it refuses to replace an object that nobody changed (If-Match with the current ETag fails)"
    if _takes(lambda: store.put(key, b"fourth", if_match=etag)):
        return "it lets a writer replace what another has changed since (If-Match is ignored)"
    return None


def _takes(write: Callable[[], None]) -> bool:
    try:
        write()
    except PreconditionFailed:
        return False
    return True
