import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kintsugi.errors import IntegrityError, ObjectNotFound, PreconditionFailed, StoreError, StoreUnavailable
from kintsugi.storage import LocalStore, MemoryStore, ObjectStore
from kintsugi_serve.objects.results import Results, StoredResult, digest_of, result_key

INPUT, MODEL = "1" * 64, "2" * 64
FACTS = {"retention": 0.9876, "report": {"alarm": False, "reasons": ["ö", None]}, "model": "unet@3"}
KEY = result_key("line-3", INPUT, MODEL, {"white_level": 4095, "embed": False})


class Failing(MemoryStore):
    """Fails from the given write on; what is written before stays."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self.writes = writes

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        if not self.writes:
            raise StoreUnavailable("the store is away")
        self.writes -= 1
        super().put(key, data, if_none_match=if_none_match, if_match=if_match)


@pytest.fixture(params=["memory", "local"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "store")


def _names(store: ObjectStore) -> list[str]:
    return [info.key for info in store.list()]


# ---------------------------------------------------------------------------- the address


def test_a_result_lies_below_its_tenant_its_input_and_its_model() -> None:
    assert KEY.startswith(f"results/line-3/{INPUT}/{MODEL}/")
    assert KEY.rpartition("/")[2] == hashlib.sha256(b'{"embed":false,"white_level":4095}').hexdigest()


def test_the_same_question_has_one_address_and_another_question_has_another() -> None:
    params: dict[str, Any] = {"white_level": 1023, "mask": "3" * 64, "embed": True}
    key = result_key("a", INPUT, MODEL, params)
    assert key == result_key("a", INPUT, MODEL, dict(reversed(params.items())))
    others = [
        result_key("b", INPUT, MODEL, params),
        result_key("a", MODEL, INPUT, params),
        result_key("a", INPUT, MODEL, {}),
        result_key("a", INPUT, MODEL, {**params, "white_level": 1024}),
        result_key("a", INPUT, MODEL, {**params, "white_level": "1023"}),
        result_key("a", INPUT, MODEL, {**params, "white_level": None}),
        result_key("a", INPUT, MODEL, {**params, "embed": False}),
        result_key("a", INPUT, MODEL, {**params, "embed": 1}),
        result_key("a", INPUT, MODEL, {**params, "mask": "4" * 64}),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_a_parameter_that_is_not_given_changes_no_address() -> None:
    assert result_key("a", INPUT, MODEL, {"embed": True, "later": None}) == result_key(
        "a", INPUT, MODEL, {"embed": True}
    )


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()))
def test_the_digest_does_not_depend_on_the_order_and_survives_json(document: dict[str, Any]) -> None:
    assert digest_of(dict(reversed(document.items()))) == digest_of(document)
    assert digest_of(json.loads(json.dumps(document))) == digest_of(document)


@pytest.mark.parametrize(
    ("tenant", "source", "model"),
    [("../b", INPUT, MODEL), ("", INPUT, MODEL), ("a/b", INPUT, MODEL), ("a", "", MODEL), ("a", INPUT, "x" * 64)],
)
def test_what_is_no_tenant_or_hash_makes_no_address(tenant: str, source: str, model: str) -> None:
    with pytest.raises(StoreError, match="is not the key of a result"):
        result_key(tenant, source, model, {})


@pytest.mark.parametrize("key", ["models/unet/versions/1/weights.safetensors", KEY + "x", KEY + "/x", "results", ""])
def test_nothing_else_is_read_or_written_as_a_result(key: str) -> None:
    results = Results(MemoryStore({"models/unet/versions/1/weights.safetensors": b"weights"}))
    for attempt in (lambda: results.find(key), lambda: results.keep(key, b"image", {})):
        with pytest.raises(StoreError, match="is not the key of a result"):
            attempt()


# ---------------------------------------------------------------------------- keep and find


def test_what_was_kept_is_found_with_its_facts(objects: ObjectStore) -> None:
    results = Results(objects)
    assert results.find(KEY) is None
    kept, created = results.keep(KEY, b"image", FACTS)
    assert created
    assert kept == results.find(KEY) == StoredResult(KEY, f"{objects.uri}/{KEY}", b"image", FACTS)
    assert objects.get(KEY) == b"image"


def test_keeping_it_again_makes_no_second_object(objects: ObjectStore) -> None:
    results = Results(objects)
    first, _ = results.keep(KEY, b"image", FACTS)
    names = _names(objects)
    again, created = results.keep(KEY, b"image", {**FACTS, "retention": 0.5})
    assert (again, created) == (first, False)
    assert _names(objects) == names and len(names) == 2


def test_the_first_result_wins_over_other_bytes(objects: ObjectStore) -> None:
    results = Results(objects)
    first, _ = results.keep(KEY, b"image", FACTS)
    assert results.keep(KEY, b"another image", {"retention": 0.1}) == (first, False)
    assert results.find(KEY) == first


@pytest.mark.parametrize("same", [True, False])
def test_of_fifty_who_keep_one_key_one_creates_and_all_get_the_same(objects: ObjectStore, same: bool) -> None:
    results, together = Results(objects), threading.Barrier(50)

    def keep(number: int) -> tuple[StoredResult, bool]:
        together.wait()
        return results.keep(KEY, b"image" if same else b"image %d" % number, {"number": number})

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(keep, range(50)))
    assert sum(created for _, created in answers) == 1
    assert len({(answer.image, answer.facts["number"]) for answer, _ in answers}) == 1
    assert results.find(KEY) == answers[0][0]
    assert [name for name in _names(objects) if not name.endswith(".json")] == [KEY]


def test_whoever_finds_a_result_while_others_keep_it_finds_it_whole(objects: ObjectStore) -> None:
    results, together = Results(objects), threading.Barrier(16)

    def work(number: int) -> StoredResult | None:
        together.wait()
        if number % 2:
            return results.keep(KEY, b"image %d" % number, {"number": number})[0]
        return next((found for _ in range(50) if (found := results.find(KEY))), None)

    with ThreadPoolExecutor(16) as pool:
        found = [result for result in pool.map(work, range(16)) if result is not None]
    assert len(found) >= 8
    assert all(result == found[0] for result in found)


@pytest.mark.parametrize("image", [b"image", b"made anew, with other bytes"])
@pytest.mark.parametrize("writes", [0, 1])
def test_a_writer_that_dies_before_the_end_leaves_no_result_and_the_next_one_heals_it(
    writes: int, image: bytes
) -> None:
    store = Failing(writes)
    results = Results(store, seconds=0)
    with pytest.raises(StoreUnavailable):
        results.keep(KEY, b"image", FACTS)
    assert results.find(KEY) is None
    assert len(_names(store)) == writes
    store.writes = 9
    kept, created = results.keep(KEY, image, FACTS)
    assert created
    assert (kept.image, kept.facts) == (image, FACTS)
    assert results.find(KEY) == kept


def test_a_writer_that_was_only_slow_does_not_spoil_the_result_of_the_next_one() -> None:
    store = Failing(1)
    with pytest.raises(StoreUnavailable):
        Results(store, seconds=0).keep(KEY, b"slow", {"from": "slow"})
    store.writes = 9
    quick, _ = Results(store).keep(KEY, b"quick", {"from": "quick"})
    # The slow one goes on where it was.
    with pytest.raises(PreconditionFailed):
        store.put(KEY, b"slow", if_none_match=True)
    assert Results(store).keep(KEY, b"slow", {"from": "slow"}) == (quick, False)


def test_the_slow_writer_may_also_come_first_and_then_wins_whole() -> None:
    store = Failing(1)
    with pytest.raises(StoreUnavailable):
        Results(store, seconds=0).keep(KEY, b"slow", {"from": "slow"})
    store.writes = 1
    with pytest.raises(StoreUnavailable):
        Results(store, seconds=0).keep(KEY, b"quick", {"from": "quick"})
    store.writes = 9
    store.put(KEY, b"slow", if_none_match=True)
    kept, created = Results(store).keep(KEY, b"quick", {"from": "quick"})
    assert (kept.image, kept.facts, created) == (b"slow", {"from": "slow"}, False)


def test_a_writer_whom_s3_refuses_for_one_that_then_fails_writes_after_all() -> None:
    class Contended(MemoryStore):
        refused: set[str]

        def put(
            self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
        ) -> None:
            if key not in self.refused:
                self.refused.add(key)
                raise PreconditionFailed("ConditionalRequestConflict")
            super().put(key, data, if_none_match=if_none_match, if_match=if_match)

    store = Contended()
    store.refused = set()
    assert Results(store).keep(KEY, b"image", FACTS)[1] is True
    assert len(store.refused) == 2


def test_a_store_that_is_away_for_a_moment_or_whose_answers_get_lost_costs_no_result() -> None:
    class Lossy(MemoryStore):
        turns = 0

        def put(
            self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
        ) -> None:
            self.turns += 1
            if self.turns % 3 == 1:
                raise StoreUnavailable("away")
            super().put(key, data, if_none_match=if_none_match, if_match=if_match)
            if self.turns % 3 == 2:
                raise StoreUnavailable("done, but the answer is lost")

    store = Lossy()
    kept, _ = Results(store).keep(KEY, b"image", FACTS)
    assert kept == Results(store).find(KEY)
    assert len(_names(store)) == 2


# ---------------------------------------------------------------------------- damage


def _damaged(kind: str, store: ObjectStore) -> None:
    facts_key = next(name for name in _names(store) if name.endswith(".json"))
    facts = store.get(facts_key)
    match kind:
        case "another image":
            store.put(KEY, b"imagf")
        case "an image cut off":
            store.put(KEY, b"imag")
        case "an empty image":
            store.put(KEY, b"")
        case "no facts":
            store.delete(facts_key)
        case "facts cut off":
            store.put(facts_key, facts[:-5])
        case "facts with another figure":
            store.put(facts_key, facts.replace(b"0.9876", b"0.9976"))
        case "facts of another image":
            other = hashlib.sha256(b"image").hexdigest().encode()
            store.put(facts_key, facts.replace(other, b"0" * 64))
        case "facts that are no text":
            store.put(facts_key, b"\xff\xfe")
        case _:
            store.put(facts_key, b"[]")


@pytest.mark.parametrize(
    "kind",
    [
        "another image",
        "an image cut off",
        "an empty image",
        "no facts",
        "facts cut off",
        "facts with another figure",
        "facts of another image",
        "facts that are no text",
        "facts of another kind",
    ],
)
def test_damage_is_never_given_out_and_the_error_says_what_to_do(objects: ObjectStore, kind: str) -> None:
    results = Results(objects)
    results.keep(KEY, b"image", FACTS)
    _damaged(kind, objects)
    with pytest.raises(IntegrityError, match=r"delete .*, then ask again"):
        results.find(KEY)


@pytest.mark.parametrize("kind", ["another image", "an image cut off", "facts cut off", "facts with another figure"])
def test_damage_is_not_taken_for_a_result_when_it_is_kept_again(objects: ObjectStore, kind: str) -> None:
    results = Results(objects)
    results.keep(KEY, b"image", FACTS)
    _damaged(kind, objects)
    with pytest.raises(IntegrityError):
        results.keep(KEY, b"image", FACTS)


def test_facts_that_were_lost_are_written_again_by_whoever_made_the_same_image(objects: ObjectStore) -> None:
    results = Results(objects)
    first, _ = results.keep(KEY, b"image", FACTS)
    _damaged("no facts", objects)
    assert results.keep(KEY, b"image", FACTS) == (first, False)
    assert results.find(KEY) == first


def test_damaged_facts_keep_an_image_from_being_published_with_them() -> None:
    store = Failing(1)
    with pytest.raises(StoreUnavailable):
        Results(store, seconds=0).keep(KEY, b"image", FACTS)
    store.writes = 9
    _damaged("facts cut off", store)
    with pytest.raises(IntegrityError):
        Results(store).keep(KEY, b"image", FACTS)
    with pytest.raises(ObjectNotFound):
        store.get(KEY)


def test_facts_that_json_cannot_hold_are_refused_before_anything_is_written(objects: ObjectStore) -> None:
    for facts in ({"x": float("nan")}, {"x": b"bytes"}):
        with pytest.raises((TypeError, ValueError)):
            Results(objects).keep(KEY, b"image", facts)
    assert _names(objects) == []


@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ),
    ),
    st.binary(),
)
def test_every_image_and_all_facts_come_back_as_they_were(facts: dict[str, Any], image: bytes) -> None:
    results = Results(MemoryStore())
    results.keep(KEY, image, facts)
    found = results.find(KEY)
    assert found is not None
    assert (found.image, found.facts) == (image, facts)
