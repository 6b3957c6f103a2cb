"""Results under the address of what they were made from: the input, the model and the parameters.

A result is one object, the restored file. What is known of it, its facts, is a second one beside it whose name holds
the SHA-256 of the file. The facts are written first, so that whoever finds a file finds its facts, and a writer that
died between the two leaves nothing that a later one could take for a result.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from kintsugi.errors import IntegrityError, ObjectNotFound, StoreError
from kintsugi.storage import ObjectStore, create, sha256
from kintsugi_serve.keys import TENANT

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
        record = _encoded(image, facts)
        earlier = self._create(_facts_key(_checked(key), image), record)
        result = self._result(key, image, record if earlier is None else earlier)
        there = self._create(key, image)
        if there is not None and there != image:
            return self._with_facts(key, there), False
        return result, there is None

    def _create(self, key: str, data: bytes) -> bytes | None:
        return create(self._store, key, data, lambda: self._store.get(key), seconds=self._seconds)

    def _with_facts(self, key: str, image: bytes) -> StoredResult:
        try:
            record = self._store.get(_facts_key(key, image))
        except ObjectNotFound:
            raise IntegrityError(
                f"{self._store.uri}/{key} is damaged, it has no facts that fit: delete it, then ask again"
            ) from None
        return self._result(key, image, record)

    def _result(self, key: str, image: bytes, record: bytes) -> StoredResult:
        uri = f"{self._store.uri}/{key}"
        try:
            read = _Record.model_validate(json.loads(record))
        except ValueError:  # of JSON, of UTF-8, or of pydantic
            raise IntegrityError(f"the facts of {uri} are damaged: delete both, then ask again") from None
        fits = (read.image_sha256, read.image_bytes) == (sha256(image), len(image))
        if not fits or read.facts_sha256 != digest_of(read.facts):
            raise IntegrityError(f"{uri} and its facts do not fit together: delete both, then ask again")
        return StoredResult(key, uri, image, read.facts)


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


def _encoded(image: bytes, facts: Mapping[str, Any]) -> bytes:
    told = json.loads(_canonical(facts))
    record = {"image_sha256": sha256(image), "image_bytes": len(image), "facts_sha256": digest_of(told)}
    return _canonical({**record, "facts": told})


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _facts_key(key: str, image: bytes) -> str:
    return f"{key}.{sha256(image)}.json"


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise StoreError(f"{key!r} is not the key of a result: make it with result_key from a tenant and SHA-256s")
    return key
