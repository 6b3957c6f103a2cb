from pathlib import Path

import pytest

from kintsugi import store_check
from kintsugi.errors import PreconditionFailed, StoreError, StoreUnavailable
from kintsugi.storage import LocalStore, MemoryStore


class Careless(MemoryStore):
    """Ignores the conditions that it is told to ignore."""

    def __init__(self, *ignored: str) -> None:
        super().__init__()
        self.ignored = ignored

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        create = if_none_match and "if_none_match" not in self.ignored
        super().put(key, data, if_none_match=create, if_match=None if "if_match" in self.ignored else if_match)


class Deaf(MemoryStore):
    """Refuses every replacement, as a store does that takes If-Match for If-None-Match."""

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        super().put(key, data, if_none_match=True)


class ReadOnly(MemoryStore):
    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        raise StoreError("no writes")


class Stuttering(MemoryStore):
    """Has written already when it says that someone else has."""

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        super().put(key, data)
        raise PreconditionFailed(key)


def test_a_store_that_keeps_its_conditions_passes_and_holds_nothing_afterwards(tmp_path: Path) -> None:
    for store in (MemoryStore(), LocalStore(tmp_path)):
        assert store_check.fault(store) is None
        assert list(store.list()) == []


@pytest.mark.parametrize(
    ("store", "told"),
    [
        (Careless("if_none_match"), "If-None-Match is ignored"),
        (Careless("if_match"), "If-Match is ignored"),
        (Careless("if_none_match", "if_match"), "If-None-Match is ignored"),
        (Deaf(), "If-Match with the current ETag fails"),
    ],
    ids=["create", "replace", "both", "deaf"],
)
def test_a_store_that_breaks_a_condition_is_told_apart_and_left_empty(store: MemoryStore, told: str) -> None:
    assert told in (store_check.fault(store) or "")
    assert list(store.list()) == []


def test_a_store_that_takes_no_writes_says_so() -> None:
    with pytest.raises(StoreError, match="no writes"):
        store_check.fault(ReadOnly())


def test_an_unclear_answer_asks_for_another_try_and_leaves_nothing() -> None:
    store = Stuttering()
    with pytest.raises(StoreUnavailable, match="try again"):
        store_check.fault(store)
    assert list(store.list()) == []
