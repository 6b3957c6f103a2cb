import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kintsugi.data import shards
from kintsugi.data.dataset import build_dataset, contact_sheet, inspect_dataset, open_split, resolve_dataset
from kintsugi.data.layouts import SPLITS
from kintsugi.errors import DataError, IntegrityError
from kintsugi.imaging import Image
from kintsugi.manifest import read_manifest
from kintsugi.storage import MemoryStore, ObjectStore

Pairs = Callable[..., Path]
Write = Callable[[str, Image | np.ndarray | bytes], None]
Picture = Callable[..., Image]


@pytest.fixture(autouse=True)
def _private_temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of bad pairs outlives a refused build on purpose; here it goes with the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def splits_of_parts(store: ObjectStore, ref: str, cache: Path) -> dict[str, set[str]]:
    _, manifest = resolve_dataset(store, ref)
    splits: dict[str, set[str]] = {}
    for split in SPLITS:
        if any(name.startswith(split) for name in manifest.files):
            reader = open_split(store, ref, split, cache)
            for index in range(len(reader)):
                splits.setdefault(reader.raw(index).part_id, set()).add(split)
    return splits


def split_by_manifest(folder: Path, *splits: str) -> None:
    lines = (folder / "manifest.csv").read_text().splitlines()
    named = [f"{line},{splits[i % len(splits)]}" for i, line in enumerate(lines[1:])]
    (folder / "manifest.csv").write_text("\n".join([lines[0] + ",split", *named]))


def test_a_dataset_gives_back_the_bytes_and_the_labels_that_went_in(
    store: MemoryStore, pairs: Pairs, cache: Path
) -> None:
    folder = pairs(4, bits=16)
    report = build_dataset("pairs", folder, "steel", store, fractions=(1, 0, 0))
    assert report.samples == 8 and report.counts.splits == {"train": 8} and not report.bad and not report.reused
    reader = open_split(store, report.ref, "train", cache)
    assert reader.digest == report.digest and len(reader) == len(reader.sample_ids) == 8
    for index, name in enumerate(reader.sample_ids):
        raw = reader.raw(index)
        assert raw.clean == (folder / "clean" / f"{name}.png").read_bytes()
        assert raw.mask == (folder / "mask" / f"{name}_mask.png").read_bytes()
        assert raw.degraded is None and raw.split == "train" and raw.white_level == 65535
    sample = reader.sample(reader.sample_ids.index("p02-0"))
    assert (sample.part_id, sample.category, sample.defect_type) == ("p02", "steel", "scratch")
    assert sample.clean.bit_depth == 16 and sample.mask.sum() == 20


def test_the_same_images_build_the_same_dataset_and_nothing_is_sent_twice(store: MemoryStore, pairs: Pairs) -> None:
    first = build_dataset("pairs", pairs(4), "steel", store)
    keys = {info.key for info in store.list()}
    again = build_dataset("pairs", pairs(4, folder="elsewhere"), "steel", store)
    assert again.digest == first.digest and again.reused
    assert {info.key for info in store.list()} == keys
    assert build_dataset("pairs", pairs(5), "steel", store).digest != first.digest


def test_shards_are_cut_by_rows_and_read_as_one(store: MemoryStore, pairs: Pairs, cache: Path) -> None:
    report = build_dataset("pairs", pairs(5), "steel", store, fractions=(1, 0, 0), rows_per_shard=3)
    names = [name for name in resolve_dataset(store, "steel")[1].files if name.endswith("parquet")]
    assert sorted(names) == [f"train-{i:05d}.parquet" for i in range(4)]
    reader = open_split(store, report.ref, "train", cache)
    assert reader.sample_ids == sorted(f"p{part:02d}-{shot}" for part in range(5) for shot in range(2))
    assert [reader.sample(i).sample_id for i in (9, 0, 5)] == [reader.sample_ids[i] for i in (9, 0, 5)]


def test_a_part_never_crosses_splits_and_new_parts_move_no_old_one(
    store: MemoryStore, pairs: Pairs, cache: Path
) -> None:
    small = build_dataset("pairs", pairs(12), "steel", store, fractions=(0.5, 0.25, 0.25))
    large = build_dataset("pairs", pairs(40), "steel", store, fractions=(0.5, 0.25, 0.25))
    before, after = (splits_of_parts(store, report.ref, cache) for report in (small, large))
    assert all(len(splits) == 1 for splits in after.values()) and len(after) == 40
    assert {part: after[part] for part in before} == before
    assert {split for splits in after.values() for split in splits} == set(SPLITS)


def test_a_part_in_two_splits_stops_the_build(store: MemoryStore, pairs: Pairs) -> None:
    folder = pairs(2)
    split_by_manifest(folder, "train", "val")
    with pytest.raises(DataError, match=r"part 'p00' is in train and in val"):
        build_dataset("pairs", folder, "steel", store)
    assert not list(store.list())


def test_one_image_under_two_names_does_not_reach_two_splits(
    store: MemoryStore, write: Write, picture: Picture, tmp_path: Path
) -> None:
    for split, names in (("train", "abc"), ("val", "de")):
        for name in names:
            write(f"{split}/clean/{name}.png", picture(ord("a") if name == "e" else ord(name)))
    report = build_dataset("pairs", tmp_path, "steel", store, max_bad=0.5)
    assert report.counts.splits == {"train": 3, "val": 1}
    assert [(bad.name, bad.reason) for bad in report.bad] == [("e", "the same image is in train already, as a")]


def test_a_pattern_names_the_part_and_must_fit_every_sample(store: MemoryStore, pairs: Pairs, cache: Path) -> None:
    report = build_dataset("pairs", pairs(12), "steel", store, part_pattern=r"p(\d)\d", fractions=(0.5, 0.5, 0))
    assert report.parts == 2 and set(splits_of_parts(store, report.ref, cache)) == {"0", "1"}
    assert build_dataset("pairs", pairs(12), "steel", store, part_pattern=r"p\d").parts == 2
    with pytest.raises(DataError, match=r"finds no part in 'p00-1'"):
        build_dataset("pairs", pairs(12), "steel", store, part_pattern=r"(p\d\d)-0")
    with pytest.raises(DataError, match="not a regular expression"):
        build_dataset("pairs", pairs(12), "steel", store, part_pattern="(")


def test_bad_pairs_are_set_aside_and_named(store: MemoryStore, pairs: Pairs) -> None:
    folder = pairs(60)
    (folder / "clean" / "p07-0.png").write_bytes(b"torn")
    report = build_dataset("pairs", folder, "steel", store)
    assert report.samples == 119 and [bad.name for bad in report.bad] == ["p07-0"]
    prefix, manifest = resolve_dataset(store, "steel")
    published = json.loads(store.get(f"{prefix}/report.json"))
    assert published["good"] == 119 and published["bad"][0]["name"] == "p07-0"
    assert manifest.meta["bad"] == 1 and str(folder) not in json.dumps(published)


def test_more_than_one_in_a_hundred_bad_pairs_publishes_nothing_and_lists_them(
    store: MemoryStore, pairs: Pairs
) -> None:
    folder = pairs(20)
    (folder / "clean" / "p07-0.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"1 of 40 pairs .*p07-0: not a PNG") as caught:
        build_dataset("pairs", folder, "steel", store)
    assert not list(store.list())
    found = re.search(r"listed in (\S+\.json)", str(caught.value))
    assert found is not None
    assert json.loads(Path(found.group(1)).read_text())["bad"][0]["name"] == "p07-0"


def test_a_folder_without_a_good_image_is_refused(store: MemoryStore, write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty" / "clean").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no image"):
        build_dataset("pairs", tmp_path / "empty", "steel", store)
    write("torn/clean/a.png", b"torn")
    with pytest.raises(DataError, match="1 of 1 pairs"):
        build_dataset("pairs", tmp_path / "torn", "steel", store, max_bad=1)


def test_a_second_image_with_the_same_id_is_set_aside(
    store: MemoryStore, write: Write, picture: Picture, tmp_path: Path
) -> None:
    write("train/clean/a.png", picture(1))
    write("val/clean/a.png", picture(2))
    report = build_dataset("pairs", tmp_path, "steel", store, max_bad=0.5)
    assert report.samples == 1 and report.bad[0].reason == "another image has the same id"


class FailingStore(MemoryStore):
    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        if key.endswith("report.json"):
            raise ConnectionError("the wire was cut")
        super().put(key, data, if_none_match=if_none_match, if_match=if_match)


def test_a_build_that_breaks_off_leaves_no_dataset(pairs: Pairs) -> None:
    store = FailingStore()
    with pytest.raises(ConnectionError):
        build_dataset("pairs", pairs(4), "steel", store)
    with pytest.raises(DataError, match="there is no dataset 'steel'"):
        resolve_dataset(store, "steel")


def test_a_name_means_what_was_built_last_and_a_digest_means_itself(store: MemoryStore, pairs: Pairs) -> None:
    four, five = pairs(4, folder="four"), pairs(5, folder="five")
    first = build_dataset("pairs", four, "steel", store)
    second = build_dataset("pairs", five, "steel", store)
    assert resolve_dataset(store, "steel")[0].endswith(second.digest)
    assert resolve_dataset(store, f"steel@{first.digest[:8]}")[0].endswith(first.digest)
    build_dataset("pairs", four, "steel", store)
    assert resolve_dataset(store, "steel")[0].endswith(first.digest)
    prefix, manifest = resolve_dataset(store, first.ref)
    assert read_manifest(store, prefix) == manifest and manifest.digest == first.digest


def test_a_dataset_that_is_not_there_is_answered_with_those_that_are(store: MemoryStore, pairs: Pairs) -> None:
    with pytest.raises(DataError, match="the store has none"):
        resolve_dataset(store, "steel")
    report = build_dataset("pairs", pairs(4), "steel", store)
    with pytest.raises(DataError, match=f"no dataset 'stel': there are {report.ref}"):
        resolve_dataset(store, "stel")
    with pytest.raises(DataError, match="no dataset 'steel@ffff"):
        resolve_dataset(store, "steel@ffffffffffffffffff")


def test_a_split_without_images_is_refused(store: MemoryStore, pairs: Pairs, cache: Path) -> None:
    build_dataset("pairs", pairs(2), "steel", store, fractions=(1, 0, 0))
    with pytest.raises(DataError, match="has no val images"):
        open_split(store, "steel", "val", cache)


@pytest.mark.parametrize("name", ["", "a/b", "a@b", "../x"])
def test_a_name_that_cannot_be_a_key_is_refused(store: MemoryStore, pairs: Pairs, name: str) -> None:
    with pytest.raises(DataError, match="cannot name a dataset"):
        build_dataset("pairs", pairs(2), name, store)


def test_shares_that_do_not_sum_to_one_are_refused(store: MemoryStore, pairs: Pairs) -> None:
    with pytest.raises(DataError, match="sum to 1"):
        build_dataset("pairs", pairs(2), "steel", store, fractions=(0.5, 0.1, 0.1))


def test_a_summary_counts_by_split_category_and_defect(store: MemoryStore, pairs: Pairs) -> None:
    folder = pairs(6)
    split_by_manifest(folder, "train", "train", "val", "val", "test", "test")
    report = build_dataset("pairs", folder, "steel", store)
    summary = inspect_dataset(store, "steel")
    assert summary.counts.splits == {"test": 4, "train": 4, "val": 4}
    assert summary.counts.defects == {"good": 6, "scratch": 6} and summary.counts.categories == {"steel": 12}
    assert (summary.ref, summary.samples, summary.parts, summary.layout) == (report.ref, 12, 6, "pairs")
    assert summary.smallest_side == 24


def test_a_contact_sheet_shows_the_dataset(store: MemoryStore, pairs: Pairs, tmp_path: Path, cache: Path) -> None:
    build_dataset("pairs", pairs(6), "steel", store)
    path = contact_sheet(store, "steel", tmp_path / "sheets" / "steel.png", count=5, cache=cache)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_damaged_shard_never_reaches_the_cache(store: MemoryStore, pairs: Pairs, cache: Path) -> None:
    build_dataset("pairs", pairs(2), "steel", store, fractions=(1, 0, 0))
    prefix, _ = resolve_dataset(store, "steel")
    shard = f"{prefix}/train-00000.parquet"
    store.put(shard, store.get(shard)[:-1] + b"?")
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        open_split(store, "steel", "train", cache)
    assert not list(cache.rglob("*.arrow"))


def test_the_cache_is_where_the_environment_says_at_the_time_of_the_call(
    store: MemoryStore, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_dataset("pairs", pairs(2), "steel", store, fractions=(1, 0, 0))
    monkeypatch.setenv("KINTSUGI_CACHE", str(tmp_path / "here"))
    assert open_split(store, "steel", "train").path.is_relative_to(tmp_path / "here")
    monkeypatch.delenv("KINTSUGI_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_split(store, "steel", "train").path.is_relative_to(tmp_path / "home" / ".cache" / "kintsugi")


def test_an_index_outside_the_split_is_an_error(store: MemoryStore, pairs: Pairs, cache: Path) -> None:
    build_dataset("pairs", pairs(1), "steel", store, fractions=(1, 0, 0))
    reader = open_split(store, "steel", "train", cache)
    for index in (2, -1):
        with pytest.raises(IndexError):
            reader.raw(index)


def with_presets(folder: Path) -> Path:
    """Give each image of a folder of pairs a degraded one, by the preset of its number."""
    shutil.copytree(folder / "clean", folder / "degraded")
    head, *lines = (folder / "manifest.csv").read_text().splitlines()
    named = [f"{line},{('kla', 'noise', '')[i % 3]}" for i, line in enumerate(lines)]
    (folder / "manifest.csv").write_text("\n".join([head + ",preset", *named]))
    return folder


def test_the_preset_of_each_image_comes_back(store: MemoryStore, pairs: Pairs, cache: Path) -> None:
    report = build_dataset("pairs", with_presets(pairs(2)), "steel", store, fractions=(1, 0, 0))
    reader = open_split(store, report.ref, "train", cache)
    found = dict(zip(reader.sample_ids, (reader.sample(i).preset for i in range(4)), strict=True))
    assert found == {"p00-0": "kla", "p00-1": "noise", "p01-0": None, "p01-1": "kla"}


def test_a_dataset_and_a_local_copy_from_before_presets_still_open(
    store: MemoryStore, pairs: Pairs, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = shards.SCHEMA
    with monkeypatch.context() as patch:
        patch.setattr(shards, "SCHEMA", now.remove(now.get_field_index("preset")))
        patch.setattr(shards, "LATER", ())
        ref = build_dataset("pairs", with_presets(pairs(2)), "steel", store, fractions=(1, 0, 0)).ref
        open_split(store, ref, "train", cache)
    for place in (cache, cache.with_name("fresh")):
        reader = open_split(store, ref, "train", place)
        assert [reader.raw(index).preset for index in range(len(reader))] == [None] * 4
        assert reader.sample(0).clean.size == (24, 32)
