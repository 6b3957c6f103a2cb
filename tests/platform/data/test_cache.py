"""Room on this machine: which copies of splits stay, which go, and what is never touched."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from kintsugi.data import cache as copies
from kintsugi.data.dataset import build_dataset, open_split
from kintsugi.errors import CacheFull, ConfigError
from kintsugi.imaging import Image, encode
from kintsugi.storage import LocalStore

NAMES = ("a", "b", "c", "d")


class Shelf(NamedTuple):
    """A store with datasets of one size, and a cache."""

    store: LocalStore
    cache: Path
    size: int

    def open(self, name: str) -> Path:
        """Use a split, and let it go."""
        return open_split(self.store, name, "train", self.cache).path

    def there(self) -> set[str]:
        digests = {path.parent.name for path in self.cache.glob("datasets/*/train.arrow")}
        return {name for name in NAMES if any(self.store.exists(f"datasets/{name}/{d}/manifest.json") for d in digests)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    store = LocalStore(tmp_path_factory.mktemp("store"))
    for seed, name in enumerate(NAMES):
        folder = tmp_path_factory.mktemp(name)
        (folder / "clean").mkdir()
        for part in range(2):
            pixels = np.random.default_rng(10 * seed + part).integers(0, 255, (200, 200), dtype=np.uint8)
            (folder / "clean" / f"{name}{part}.png").write_bytes(encode(Image(pixels, "png", 255)))
        build_dataset("pairs", folder, name, store, fractions=(1, 0, 0))
    return store


@pytest.fixture
def shelf(built: LocalStore, tmp_path: Path) -> Shelf:
    size = open_split(built, "a", "train", tmp_path / "measured").path.stat().st_size
    return Shelf(built, tmp_path / "cache", size)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, shelf: Shelf) -> Callable[[float], None]:
    """Sets the cap to that many splits; one on its way counts for two, as its shard lies beside it."""

    def splits(count: float) -> None:
        monkeypatch.setenv("KINTSUGI_CACHE_GB", f"{count * shelf.size / 1e9:.12f}")

    return splits


def test_the_split_used_longest_ago_makes_room(shelf: Shelf, room: Callable[[float], None]) -> None:
    room(4.2)
    for age, name in enumerate("abc"):
        os.utime(shelf.open(name), (age, age))
    os.utime(shelf.open("a"))
    shelf.open("d")
    assert shelf.there() == {"a", "c", "d"}
    assert not [path for path in shelf.cache.rglob("*.json") if not path.with_suffix(".arrow").exists()]


def test_an_evicted_split_is_fetched_again(shelf: Shelf, room: Callable[[float], None]) -> None:
    room(2.2)
    for name in "abab":
        assert len(open_split(shelf.store, name, "train", shelf.cache)) == 2
        assert shelf.there() == {name}


def test_what_is_read_is_never_evicted_however_old(shelf: Shelf, room: Callable[[float], None]) -> None:
    room(3.2)
    reader = open_split(shelf.store, "a", "train", shelf.cache)
    os.utime(reader.path, (0, 0))
    shelf.open("b")
    shelf.open("c")
    assert shelf.there() == {"a", "c"} and reader.raw(1).sample_id == "a1"


def test_a_split_that_cannot_fit_says_what_to_do_and_evicts_nothing_in_use(
    shelf: Shelf, room: Callable[[float], None]
) -> None:
    room(2.2)
    reader = open_split(shelf.store, "a", "train", shelf.cache)
    with pytest.raises(CacheFull, match=r"train images of datasets/b/.* raise KINTSUGI_CACHE_GB, let KINTSUGI_CACHE"):
        shelf.open("b")
    assert shelf.there() == {"a"} and reader.raw(0).sample_id == "a0"
    room(4.2)
    shelf.open("b")


def test_without_a_cap_copies_go_when_little_of_the_disk_stays_free(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = shelf.open("a").stat().st_size

    class Disk(NamedTuple):
        total: int
        free: int

    def disk(root: Path) -> Disk:
        taken = sum(path.stat().st_size for path in root.rglob("*.arrow"))
        return Disk(100 * used, 8 * used - taken)

    monkeypatch.setattr(copies.shutil, "disk_usage", disk)
    shelf.open("b")
    assert shelf.there() == {"b"}


def test_a_disk_that_is_full_is_told(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk(NamedTuple):
        total: int = 100
        free: int = 10

    monkeypatch.setattr(copies.shutil, "disk_usage", lambda _: Disk())
    with pytest.raises(CacheFull, match="on the disk of"):
        shelf.open("a")


@pytest.mark.parametrize("value", ["0", "-1", "lots", "nan"])
def test_a_cap_that_is_no_size_is_refused(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("KINTSUGI_CACHE_GB", value)
    with pytest.raises(ConfigError, match=f"KINTSUGI_CACHE_GB={value}: set it to a number"):
        shelf.open("a")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["the same folder", "within the cache", "linked as datasets", "linked in datasets"])
def test_no_file_of_a_store_is_deleted_wherever_it_lies(
    shelf: Shelf, room: Callable[[float], None], tmp_path: Path, place: str
) -> None:
    where = {"the same folder": shelf.cache, "within the cache": shelf.cache / "datasets" / "mine"}
    root = where.get(place, tmp_path / "elsewhere")
    root.mkdir(parents=True)
    store = LocalStore(root)
    for info in list(shelf.store.list()):
        store.put(info.key, shelf.store.get(info.key))
    # As like a copy as can be, and older than any.
    digest = "0" * 64
    for name in (f"datasets/{digest}x/train.arrow", f"datasets/mine/{digest}/train.arrow", "train.arrow"):
        store.put(name, bytes(shelf.size))
    shelf.cache.mkdir(exist_ok=True)
    if place == "linked as datasets":
        (shelf.cache / "datasets").symlink_to(root / "datasets")
    if place == "linked in datasets":
        real = root / "datasets" / "whole"
        real.mkdir()
        (real / "train.arrow").write_bytes(bytes(shelf.size))
        (real / "train.json").write_text("{}")
        (shelf.cache / "datasets").mkdir()
        (shelf.cache / "datasets" / digest).symlink_to(real)
    before = files_of(root)
    room(2.2)
    for name in NAMES:
        open_split(store, name, "train", shelf.cache)
    after = files_of(root)
    assert {name: after.get(name) for name in before} == before
    assert shelf.there() == {NAMES[-1]}


def test_what_a_killed_fetch_left_is_cleared_by_the_next(shelf: Shelf) -> None:
    left = shelf.cache / "datasets" / ".kintsugi-part"
    left.mkdir(parents=True)
    (left / "part.arrow").write_bytes(bytes(9999))
    shelf.open("a")
    assert not left.exists()


READ_ALL = """
import random, sys
from pathlib import Path
from kintsugi.data.dataset import open_split
from kintsugi.storage import LocalStore
store, cache, seed = LocalStore(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])

def size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # evicted by another process
        return 0

for name in random.Random(seed).choices("abcd", k=25):
    reader = open_split(store, name, "train", cache)
    assert [reader.raw(i).sample_id for i in (0, 1)] == [f"{name}0", f"{name}1"]
    total = sum(size(path) for path in cache.glob("datasets/*/*.arrow"))
    assert total <= float(sys.argv[4]), total
    del reader
"""


def test_several_processes_share_a_cap_and_each_reads_what_it_asked_for(
    shelf: Shelf, room: Callable[[float], None]
) -> None:
    # Three may be held at a time, and the fourth process' own needs twice its size while it comes.
    room(5.2)
    words = [sys.executable, "-c", READ_ALL, str(shelf.store.root), str(shelf.cache)]
    readers = [
        subprocess.Popen([*words, str(seed), str(5.2 * shelf.size)], stderr=subprocess.PIPE) for seed in range(3)
    ]
    for process in readers:
        _, told = process.communicate(timeout=200)
        assert process.returncode == 0, told.decode()
    assert len(shelf.there()) <= 4


def test_the_cap_is_read_when_a_split_is_opened(
    shelf: Shelf, room: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KINTSUGI_CACHE_GB", raising=False)
    for name in NAMES:
        shelf.open(name)
    assert shelf.there() == set(NAMES)
    room(2.2)
    shelf.open("a")
    assert shelf.there() == set(NAMES), "what is there already needs no room"
