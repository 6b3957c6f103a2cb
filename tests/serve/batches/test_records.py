"""Planning, restoring block by block, the ledger and progress, without Ray."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kintsugi import imaging
from kintsugi.errors import IntegrityError, ObjectNotFound, RunInterrupted, StoreUnavailable
from kintsugi.restore.restorer import Restoration
from kintsugi.storage import LocalStore, MemoryStore, sha256
from kintsugi.trust.report import Report
from kintsugi_serve.batches import records as batch_records
from kintsugi_serve.batches.batch import Counts, Input, Line, make_batch
from kintsugi_serve.batches.records import TRIES, Records
from kintsugi_serve.batches.run import Bench, restore_block, restore_image
from kintsugi_serve.jobs import LoadedModel

MODEL = LoadedModel("unet", 3, "d" * 64)


class Killed(BaseException):
    """What ends a process, seen from within it."""


class Darkener:
    """A model that halves every value; images of width `kills` end the process, those of width `fails` the call."""

    def __init__(self, kills: int = 0, fails: int = 0) -> None:
        self.kills, self.fails = kills, fails
        self.widths: list[int] = []

    def restore(self, image: imaging.Image) -> Restoration:
        self.widths.append(image.size[1])
        if image.size[1] == self.kills:
            raise Killed
        if image.size[1] == self.fails:
            raise RuntimeError("out of memory")
        report = Report(0.98765432, 0.9, 0.0, 0.0, 0.1, 0.01, alarm=image.size[1] == 41)
        return Restoration(replace(image, pixels=(image.pixels // 2).astype(image.pixels.dtype)), report)


class Away(MemoryStore):
    """A store that does not answer for some keys."""

    def __init__(self, keys: set[str]) -> None:
        super().__init__()
        self.keys = keys

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        if key in self.keys:
            raise StoreUnavailable("no answer")
        return super().get_with_etag(key)


def _image(width: int) -> bytes:
    return imaging.encode(imaging.Image(np.full((32, width), 100, np.uint8)))


def _dark(width: int) -> bytes:
    return imaging.encode(imaging.Image(np.full((32, width), 50, np.uint8)))


@pytest.fixture(autouse=True)
def blocks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_records, "BLOCK", 4)
    monkeypatch.setattr(batch_records, "SHARES", 1)


def _bench(records: Records, model: Darkener | None = None) -> Bench:
    plan = records.next_plan()
    assert plan is not None
    source, target = LocalStore(Path(records.batch.input)), LocalStore(Path(records.batch.output))
    return Bench(records, plan, model or Darkener(), source, target)


def _run(records: Records, model: Darkener | None = None) -> dict[str, Line]:
    """One round from end to end; the whole ledger."""
    bench = _bench(records, model)
    for block in records.remaining(bench.plan):
        restore_block(bench, block)
    records.finish(bench.plan)
    return records.merged(bench.plan.round)


def _ledger(records: Records, round: int = 1) -> list[dict[str, object]]:
    body = records.store.get(f"{records.root}/{round}/ledger.jsonl")
    return [json.loads(line) for line in body.splitlines()]


def test_every_input_has_one_line_and_every_image_its_result(
    records: Records, raw: LocalStore, clean: LocalStore
) -> None:
    raw.put("a/notes.txt", b"not an image")
    raw.put("b/cut.png", _image(40)[:60])
    _run(records)
    lines = _ledger(records)
    assert [line["key"] for line in lines] == [info.key for info in raw.list()]
    assert [line["status"] for line in lines] == ["restored"] * 10 + ["refused"] * 2
    assert [line["code"] for line in lines[-2:]] == ["unsupported_format", "undecodable"]
    assert {info.key: clean.get(info.key) for info in clean.list()} == {f"a/{w}.png": _dark(w) for w in range(40, 50)}
    first = lines[0]
    assert first["input_sha256"] == sha256(_image(40)) and first["output_sha256"] == sha256(_dark(40))
    assert first["output"] == f"{clean.uri}/a/40.png"
    assert first["digest"] == MODEL.digest and first["retention"] == 0.987654
    assert [line["key"] for line in lines if line["alarm"]] == ["a/41.png"]


def test_done_is_the_hash_and_the_totals_of_the_ledger(records: Records) -> None:
    _run(records)
    done = records.done(1)
    assert done is not None
    assert done.ledger_sha256 == sha256(records.store.get(f"{records.root}/1/ledger.jsonl"))
    assert done.totals == Counts(restored=10, alarms=1)


def test_what_lies_at_an_output_is_kept_or_refused_and_never_replaced(records: Records, clean: LocalStore) -> None:
    clean.put("a/40.png", _dark(40))
    clean.put("a/41.png", b"mine")
    lines = _run(records)
    assert lines["a/40.png"].status == "kept" and lines["a/40.png"].output_sha256 == sha256(_dark(40))
    assert (lines["a/41.png"].status, lines["a/41.png"].code) == ("refused", "conflict")
    assert clean.get("a/41.png") == b"mine"


def test_what_is_wrong_with_one_image_is_its_own_line(records: Records, raw: LocalStore) -> None:
    bench = _bench(records, Darkener(fails=42))
    raw.delete("a/43.png")
    items = [
        Input(2, "a/42.png", 99), Input(3, "a/43.png", 99), Input(4, "a/44.png", 2**40), Input(5, "a//x.png", 99),
    ]  # fmt: skip
    lines = [restore_image(bench, item) for item in items]
    assert [line.status for line in lines] == ["failed", "refused", "refused", "refused"]
    assert [line.code for line in lines] == ["internal", "missing", "too_large", "bad_key"]
    assert lines[0].detail == "RuntimeError: out of memory" and lines[0].input_sha256 == sha256(_image(42))


def test_a_white_level_is_that_of_every_image(store: LocalStore, raw: LocalStore, clean: LocalStore) -> None:
    records = Records(store, make_batch(store.uri, "local", raw.uri, clean.uri, MODEL, white_level=90))
    assert {line.code for line in _run(records).values()} == {"over_white_level"}


def test_a_round_that_was_killed_goes_on_with_what_has_no_line(records: Records, clean: LocalStore) -> None:
    bench = _bench(records, Darkener(kills=46))
    blocks = records.remaining(bench.plan)
    assert [len(block) for block in blocks] == [4, 4, 2]
    restore_block(bench, blocks[0])
    with pytest.raises(Killed):
        restore_block(bench, blocks[1])
    assert clean.exists("a/45.png")

    again = Darkener()
    lines = _run(records, again)
    assert again.widths == [44, 45, 46, 47, 48, 49]
    assert [line["key"] for line in _ledger(records)] == [f"a/{width}.png" for width in range(40, 50)]
    assert [lines[f"a/{width}.png"].status for width in (43, 44, 45, 46)] == ["restored", "kept", "kept", "restored"]


def test_a_round_is_not_finished_while_an_image_has_no_line(records: Records) -> None:
    bench = _bench(records)
    restore_block(bench, records.remaining(bench.plan)[0])
    with pytest.raises(RunInterrupted, match="6 images"):
        records.finish(bench.plan)
    assert records.done(1) is None


def test_an_image_that_ends_its_process_again_and_again_is_refused(records: Records) -> None:
    bench = _bench(records, Darkener(kills=45))
    blocks = records.remaining(bench.plan)
    for _ in range(1 + TRIES):
        with pytest.raises(Killed):
            restore_block(bench, blocks[1])
    assert restore_block(bench, blocks[1]) == Counts(refused=1, restored=2)
    lines = records.lines(1)
    assert (lines["a/45.png"].status, lines["a/45.png"].code) == ("refused", "poison")
    assert lines["a/44.png"].status == "kept"


def test_a_block_done_twice_has_its_first_lines(records: Records) -> None:
    bench = _bench(records)
    block = records.remaining(bench.plan)[0]
    restore_block(bench, block)
    assert restore_block(bench, block) == Counts()
    assert {line.status for line in records.lines(1).values()} == {"restored"}


def test_of_two_lines_of_an_image_the_first_part_counts(records: Records) -> None:
    bench = _bench(records)
    restore_block(bench, records.remaining(bench.plan)[0])
    late = records.lines(1)["a/41.png"].model_copy(update={"status": "kept"})
    records.record(bench.plan, 1, [late])
    for block in records.remaining(bench.plan):
        restore_block(bench, block)
    records.finish(bench.plan)
    assert [(line["key"], line["status"]) for line in _ledger(records)][:3] == [
        (f"a/{width}.png", "restored") for width in (40, 41, 42)
    ]


def test_an_object_that_cannot_be_read_fails_alone_and_a_store_that_is_away_stops_the_block(records: Records) -> None:
    bench = _bench(records)
    block = records.remaining(bench.plan)[0]
    source = Away({"a/41.png"})
    for width in range(40, 44):
        source.put(f"a/{width}.png", _image(width))
    assert restore_block(replace(bench, source=source), block) == Counts(restored=3, failed=1)
    assert records.lines(1)["a/41.png"].code == "store_unavailable"

    block = records.remaining(bench.plan)[0]
    with pytest.raises(StoreUnavailable, match="ask for the batch again"):
        restore_block(replace(bench, source=Away({item.key for item in block})), block)
    assert len(records.lines(1)) == 4


def test_a_finished_batch_has_nothing_to_do_until_something_changes(records: Records, raw: LocalStore) -> None:
    raw.put("a/notes.txt", b"not an image")
    _run(records)
    assert records.next_plan() is None


def test_another_round_takes_what_is_new_changed_gone_or_failed(
    records: Records, raw: LocalStore, clean: LocalStore
) -> None:
    raw.put("a/notes.txt", b"not an image")
    clean.put("a/43.png", b"in the way")
    _run(records, Darkener(fails=42))
    raw.put("a/90.png", _image(90))
    raw.put("a/44.png", _image(91))
    same_size = len(_image(46))
    raw.put("a/46.png", _image(46)[: same_size // 2].ljust(same_size, b"X"))
    for key in ("a/43.png", "a/45.png"):
        clean.delete(key)

    lines = _run(records)
    plan = records.newest()
    assert plan is not None and plan.round == 2
    assert [item.key for item in records.inputs(plan)] == [f"a/{w}.png" for w in (42, 43, 44, 45, 46, 90)]
    assert [lines[f"a/{w}.png"].status for w in (42, 43, 45, 90)] == ["restored"] * 4
    assert lines["a/46.png"].code == "undecodable"
    assert lines["a/44.png"].code == "conflict" and clean.get("a/44.png") == _dark(44)
    assert len(_ledger(records, 2)) == 12 == records.progress(alive=False).total
    assert len(_ledger(records, 1)) == 11


def test_two_who_plan_at_once_share_the_first_plan(records: Records, raw: LocalStore) -> None:
    first = records.next_plan()
    raw.put("a/99.png", _image(99))
    other = Records(records.store, records.batch)
    assert other._plan(1, [("a/99.png", 1, "")], {}) == first


def test_a_long_listing_is_kept_in_parts(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_records, "LISTED", 3)
    plan = records.next_plan()
    assert plan is not None and len(plan.inputs) == 4
    assert [(item.number, item.key) for item in records.inputs(plan)] == [
        (number, f"a/{40 + number}.png") for number in range(10)
    ]


def test_an_empty_prefix_is_refused(store: LocalStore, tmp_path: Path, clean: LocalStore) -> None:
    records = Records(store, make_batch(store.uri, "local", str(tmp_path / "nothing"), clean.uri, MODEL))
    with pytest.raises(ObjectNotFound, match="nothing under"):
        records.next_plan()


def test_objects_that_stand_for_folders_are_no_images(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from kintsugi.storage import ObjectInfo

    class Listed(MemoryStore):
        def list(self, prefix: str = "") -> "object":
            return iter(
                [ObjectInfo("", 0), ObjectInfo("b/", 0), ObjectInfo("b/1.png", 7, "e2"), ObjectInfo("a.png", 5, "e1")]
            )

    monkeypatch.setattr(batch_records, "open_store", lambda uri, patience: Listed())
    assert batch_records.listing("s3://bucket/raw") == [("a.png", 5, "e1"), ("b/1.png", 7, "e2")]


def test_progress_is_told_from_the_store_alone(records: Records) -> None:
    unplanned = records.progress(alive=True)
    assert (unplanned.status, unplanned.total, unplanned.remaining, unplanned.round) == ("running", None, None, 0)
    bench = _bench(records)
    first, *others = records.remaining(bench.plan)
    restore_block(bench, first)
    running = records.progress(alive=True)
    assert (running.status, running.total, running.restored, running.remaining) == ("running", 10, 4, 6)
    assert running.ledger is None
    records.stop("the store went away")
    stopped = records.progress(alive=False)
    assert (stopped.status, stopped.detail) == ("stopped", "the store went away")
    records.go_on()
    assert records.progress(alive=False).detail is None
    for block in others:
        restore_block(bench, block)
    records.finish(bench.plan)
    done = records.progress(alive=False)
    assert (done.status, done.restored, done.remaining, done.alarms) == ("done", 10, 0, 1)
    assert done.ledger == f"{records.store.uri}/{records.root}/1/ledger.jsonl"


@pytest.mark.parametrize("name", ["ledger.jsonl", "plan.json"])
def test_damaged_records_are_found(records: Records, name: str) -> None:
    _run(records)
    records.store.put(f"{records.root}/1/{name}", b"{}\n")
    with pytest.raises(IntegrityError, match="damaged"):
        records.next_plan()


def test_a_damaged_listing_is_found(records: Records) -> None:
    plan = records.next_plan()
    assert plan is not None
    records.store.put(f"{records.root}/inputs/{plan.inputs[0]}.jsonl", b"[]\n")
    with pytest.raises(IntegrityError, match="damaged"):
        records.inputs(plan)


@pytest.mark.parametrize(("images", "size"), [(1, 1), (12, 1), (320, 10), (5000, 64), (1_000_000, 245)])
def test_blocks_are_small_enough_to_share_and_few_enough_to_list(
    images: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert batch_records.block_size(images) == size
