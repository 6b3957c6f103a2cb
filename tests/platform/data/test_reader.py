"""Rows that are bad in the store, and copies that were damaged on this machine."""

import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kintsugi.config import parse_config
from kintsugi.data.dataset import ROOT, build_dataset, open_split
from kintsugi.data.layouts import BadPair
from kintsugi.data.loader import build_train_loader
from kintsugi.data.reader import SplitReader
from kintsugi.data.sample import RawSample, decode_sample
from kintsugi.data.shards import ShardWriters, as_row
from kintsugi.errors import BadRows, IntegrityError
from kintsugi.imaging import Image, encode
from kintsugi.manifest import make_manifest, put_folder
from kintsugi.storage import MemoryStore, sha256

Pairs = Callable[..., Path]
Picture = Callable[..., Image]
Row = dict[str, object]


class CountingStore(MemoryStore):
    downloads = 0

    def download(self, key: str, path: Path) -> None:
        self.downloads += 1
        super().download(key, path)


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def with_other_bytes(row: Row) -> Row:
    clean = bytes(row["clean"])  # type: ignore[arg-type]
    return {**row, "clean": clean[:-9] + bytes([clean[-9] ^ 1]) + clean[-8:]}


def cut_off(row: Row) -> Row:
    half = bytes(row["clean"])[:100]  # type: ignore[arg-type]
    return {**row, "clean": half, "clean_sha256": sha256(half)}


def publish(
    store: MemoryStore, folder: Path, picture: Picture, spoiled: dict[int, Callable[[Row], Row]], count: int = 200
) -> None:
    """A dataset `parts` whose shards hold what no build would let through, under hashes that fit the shards."""
    folder.mkdir()
    with ShardWriters(folder, rows_per_shard=64) as writers:
        for index in range(count):
            raw = RawSample(f"s{index:03d}", f"p{index}", "steel", "good", "train", encode(picture(index)), None, None)
            writers.write(spoiled.get(index, dict)(as_row(raw, decode_sample(raw))))
    manifest = make_manifest(folder, "dataset", {"name": "parts"})
    put_folder(store, f"{ROOT}/parts/{manifest.digest}", folder, manifest)


def damage(reader: SplitReader, index: int) -> None:
    """Flip a bit in the copy that the reader has mapped."""
    data, clean = reader.path.read_bytes(), reader.raw(index).clean
    place = data.index(clean) + len(clean) // 2
    with reader.path.open("r+b") as stream:
        stream.seek(place)
        stream.write(bytes([data[place] ^ 1]))


def test_bad_rows_are_left_out_and_named_the_same_on_every_machine(
    store: CountingStore, tmp_path: Path, picture: Picture
) -> None:
    publish(store, tmp_path / "built", picture, {70: with_other_bytes, 3: cut_off})
    one, two = (open_split(store, "parts", "train", tmp_path / machine) for machine in ("one", "two"))
    assert [row.name for row in one.skipped] == ["s003", "s070"]
    assert "cut off" in one.skipped[0].reason and "hash" in one.skipped[1].reason
    assert one.skipped == two.skipped == open_split(store, "parts", "train", tmp_path / "one").skipped
    assert one.sample_ids == two.sample_ids == [f"s{i:03d}" for i in range(200) if i not in (3, 70)]
    assert [one.sample(i).sample_id for i in range(len(one))] == one.sample_ids
    beside = json.loads(one.path.with_suffix(".json").read_text())
    assert [BadPair(**row) for row in beside["skipped"]] == list(one.skipped)


def test_a_reader_tells_the_defect_type_of_each_good_sample(
    store: CountingStore, cache: Path, tmp_path: Path, picture: Picture
) -> None:
    kinds = [("good", "scratch", "pit")[index % 3] for index in range(200)]
    spoiled = {index: lambda row, kind=kind: {**row, "defect_type": kind} for index, kind in enumerate(kinds)}
    publish(store, tmp_path / "built", picture, {**spoiled, 4: cut_off})
    reader = open_split(store, "parts", "train", cache)
    assert reader.defect_types == kinds[:4] + kinds[5:]
    assert reader.defect_types[70] == reader.sample(70).defect_type != "good"


def test_more_than_one_in_a_hundred_bad_rows_is_an_error_that_names_them(
    store: CountingStore, cache: Path, tmp_path: Path, picture: Picture
) -> None:
    publish(store, tmp_path / "built", picture, dict.fromkeys((1, 2, 3), cut_off))
    for _ in range(2):
        with pytest.raises(BadRows, match=r"3 of 200 train images .*s001: .*build the dataset again, no more than 1%"):
            open_split(store, "parts", "train", cache)
    assert len(open_split(store, "parts", "train", cache, max_bad=0.02)) == 197


def test_a_split_without_a_good_row_is_an_error(
    store: CountingStore, cache: Path, tmp_path: Path, picture: Picture
) -> None:
    publish(store, tmp_path / "built", picture, dict.fromkeys(range(3), cut_off), count=3)
    with pytest.raises(BadRows, match="3 of 3"):
        open_split(store, "parts", "train", cache, max_bad=1.0)


def test_a_damaged_row_of_the_local_copy_is_fetched_anew_once(store: CountingStore, pairs: Pairs, cache: Path) -> None:
    build_dataset("pairs", pairs(2), "steel", store, fractions=(1, 0, 0))
    reader = open_split(store, "steel", "train", cache)
    whole = reader.raw(1)
    damage(reader, 1)
    assert reader.raw(1) == whole and store.downloads == 2
    damage(reader, 1)
    with pytest.raises(IntegrityError, match=r"p00-1 in .*is damaged: check that disk"):
        reader.raw(1)
    assert store.downloads == 2


def test_of_readers_that_meet_the_same_damage_one_fetches(store: CountingStore, pairs: Pairs, cache: Path) -> None:
    build_dataset("pairs", pairs(2), "steel", store, fractions=(1, 0, 0))
    readers = [open_split(store, "steel", "train", cache) for _ in range(5)]
    whole = readers[0].raw(1)
    damage(readers[0], 1)
    found: list[RawSample] = []
    threads = [threading.Thread(target=lambda reader=reader: found.append(reader.raw(1))) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [whole] * 5 and store.downloads == 2


@pytest.mark.parametrize("damaged", ["cut off", "emptied", "without a record", "with a broken record"])
def test_a_copy_that_is_not_whole_is_fetched_anew(
    store: CountingStore, pairs: Pairs, cache: Path, damaged: str
) -> None:
    build_dataset("pairs", pairs(2), "steel", store, fractions=(1, 0, 0))
    path = open_split(store, "steel", "train", cache).path
    record, data = path.with_suffix(".json"), path.read_bytes()
    path.unlink()
    path.write_bytes({"cut off": data[:-100], "emptied": b""}.get(damaged, data))
    record.write_text({"without a record": "", "with a broken record": "{"}.get(damaged, record.read_text()))
    reader = open_split(store, "steel", "train", cache)
    assert reader.path.read_bytes() == data and store.downloads == 2
    assert reader.sample(3).sample_id == "p01-1"


def test_readers_that_open_at_once_fetch_once(store: CountingStore, pairs: Pairs, cache: Path) -> None:
    build_dataset("pairs", pairs(4), "steel", store, fractions=(1, 0, 0))
    lengths: list[int] = []
    threads = [
        threading.Thread(target=lambda: lengths.append(len(open_split(store, "steel", "train", cache))))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [8] * 6 and store.downloads == 1


def test_a_reader_opens_the_same_copy_in_another_process(store: CountingStore, pairs: Pairs, cache: Path) -> None:
    build_dataset("pairs", pairs(2), "steel", store, fractions=(1, 0, 0))
    reader = open_split(store, "steel", "train", cache)
    again = pickle.loads(pickle.dumps(reader))
    assert (again.path, again.digest, again.raw(2)) == (reader.path, reader.digest, reader.raw(2))


def test_training_passes_over_what_is_left_of_a_split(
    store: CountingStore, cache: Path, tmp_path: Path, picture: Picture
) -> None:
    publish(store, tmp_path / "built", picture, {150: cut_off})
    reader = open_split(store, "parts", "train", cache)
    tree = {"data": {"crop": 16, "batch_size": 40}, "model": {"channels": 1, "levels": 1}, "train": {"workers": 2}}
    config = parse_config(tree)
    ranks = [list(build_train_loader(reader, config, epoch=0, rank=rank, world=2)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [5, 5]
