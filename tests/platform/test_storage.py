import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kintsugi.errors import ConfigError, ObjectNotFound, PreconditionFailed, StoreError
from kintsugi.storage import (
    LocalStore,
    MemoryStore,
    ObjectInfo,
    ObjectStore,
    Patience,
    S3Store,
    open_store,
    store_uri_from_environment,
    write_atomically,
)

AT_ONCE = Patience(seconds=0)
ESCAPES = ["", "/", "/etc/passwd", "..", "../out", "a/../../out", "a//b", "a/./b", "a/", "a\0b"]


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "store")


def test_what_was_put_is_read_back(store: ObjectStore) -> None:
    store.put("a/b.bin", b"\x00one")
    assert store.get("a/b.bin") == b"\x00one"
    assert store.exists("a/b.bin")
    assert not store.exists("a/b")


def test_a_file_is_put_by_its_path(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"content")
    store.put("copy", tmp_path / "source")
    assert store.get("copy") == b"content"


def test_download_writes_the_object_to_a_file(store: ObjectStore, tmp_path: Path) -> None:
    store.put("a/b", b"content")
    store.download("a/b", tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == b"content"


@pytest.mark.parametrize("key", ["missing", "folder", "file/below"])
def test_a_key_without_an_object_is_not_found(store: ObjectStore, tmp_path: Path, key: str) -> None:
    store.put("folder/object", b"")
    store.put("file", b"")
    with pytest.raises(ObjectNotFound, match=key):
        store.get(key)
    with pytest.raises(ObjectNotFound, match=key):
        store.download(key, tmp_path / "here")
    with pytest.raises(ObjectNotFound, match=key):
        store.size(key)
    assert not store.exists(key)


def test_the_size_of_an_object_is_told_without_its_neighbours(store: ObjectStore) -> None:
    for key in ("a.png.bak", "a.png/below") if isinstance(store, MemoryStore) else ("a.png.bak",):
        store.put(key, b"longer than the image")
    store.put("a.png", b"image")
    assert store.size("a.png") == 5
    store.put("a.png", b"")
    assert store.size("a.png") == 0


def test_the_start_of_an_object_is_as_long_as_asked_for_or_as_the_object(store: ObjectStore) -> None:
    store.put("k", b"II*\0 and more")
    store.put("empty", b"")
    assert (store.get_start("k", 4), store.get_start("k", 99)) == (b"II*\0", b"II*\0 and more")
    assert store.get_start("empty", 4) == b""
    with pytest.raises(ObjectNotFound):
        store.get_start("none", 4)


def test_create_only_refuses_a_key_that_exists_and_keeps_its_object(store: ObjectStore) -> None:
    store.put("k", b"first", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        store.put("k", b"second", if_none_match=True)
    assert store.get("k") == b"first"


def test_a_file_is_created_as_bytes_are(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 5000)
    store.put("k", tmp_path / "file", if_none_match=True)
    assert store.get("k") == (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(b"second")
    with pytest.raises(PreconditionFailed):
        store.put("k", tmp_path / "file", if_none_match=True)
    assert store.size("k") == 256 * 5000


def test_exactly_one_of_eight_creators_wins(store: ObjectStore) -> None:
    together = threading.Barrier(8)

    def create(number: int) -> bytes | None:
        together.wait()
        try:
            store.put("new/key", b"%d" % number, if_none_match=True)
        except PreconditionFailed:
            return None
        return b"%d" % number

    with ThreadPoolExecutor(8) as pool:
        winners = [body for body in pool.map(create, range(8)) if body is not None]
    assert winners == [store.get("new/key")]


def test_exactly_one_of_eight_updaters_with_the_same_etag_wins(store: ObjectStore) -> None:
    store.put("k", b"start")
    _, etag = store.get_with_etag("k")
    together = threading.Barrier(8)

    def update(number: int) -> bool:
        together.wait()
        try:
            store.put("k", b"%d" % number, if_match=etag)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(update, range(8))) == 1


def test_an_update_needs_the_etag_of_what_is_there(store: ObjectStore) -> None:
    store.put("k", b"one")
    _, stale = store.get_with_etag("k")
    store.put("k", b"two", if_match=stale)
    for etag in (stale, ""):
        with pytest.raises(PreconditionFailed):
            store.put("k", b"three", if_match=etag)
    assert store.get("k") == b"two"


def test_an_update_of_a_deleted_object_is_refused(store: ObjectStore) -> None:
    store.put("k", b"one")
    _, etag = store.get_with_etag("k")
    store.delete("k")
    with pytest.raises(PreconditionFailed):
        store.put("k", b"two", if_match=etag)


def test_delete_of_what_is_not_there_is_no_fault(store: ObjectStore) -> None:
    store.delete("never/was")


def test_a_listing_is_sorted_by_key_and_knows_the_sizes(store: ObjectStore) -> None:
    for key in ("a/c", "a-b", "a/b/deep", "b"):
        store.put(key, key.encode())
    assert list(store.list()) == [ObjectInfo(key, len(key)) for key in ("a-b", "a/b/deep", "a/c", "b")]


def test_a_listing_tells_an_object_that_was_replaced_by_one_of_its_size(store: ObjectStore) -> None:
    for key in ("replaced", "stays"):
        store.put(key, b"one")
    before = {info.key: info.stamp for info in store.list()}
    store.put("replaced", b"two")
    after = {info.key: info.stamp for info in store.list()}
    assert after["stays"] == before["stays"] != ""
    assert after["replaced"] != before["replaced"]


@pytest.mark.parametrize(
    ("prefix", "keys"),
    [
        ("", ["models/unet/1", "models/unet2/1", "runs/1"]),
        ("models/", ["models/unet/1", "models/unet2/1"]),
        ("models/unet", ["models/unet/1", "models/unet2/1"]),
        ("models/unet/", ["models/unet/1"]),
        ("nothing/", []),
        ("runs/1/below/", []),
    ],
)
def test_a_prefix_is_the_start_of_the_key(store: ObjectStore, prefix: str, keys: list[str]) -> None:
    for key in ("models/unet/1", "models/unet2/1", "runs/1"):
        store.put(key, b"")
    assert [info.key for info in store.list(prefix)] == keys


@pytest.mark.parametrize("key", ESCAPES)
def test_no_key_escapes_the_root(store: ObjectStore, tmp_path: Path, key: str) -> None:
    (tmp_path / "out").write_bytes(b"not yours")
    attempts: list[Callable[[], object]] = [
        lambda: store.get(key),
        lambda: store.put(key, b"mine"),
        lambda: store.delete(key),
        lambda: store.size(key),
        lambda: store.download(key, tmp_path / "here"),
    ]
    for attempt in attempts:
        with pytest.raises(StoreError, match="is not a key"):
            attempt()
    assert (tmp_path / "out").read_bytes() == b"not yours"


@pytest.mark.parametrize("prefix", ["../", "a/../..", "/", "/etc/"])
def test_no_listing_escapes_the_root(store: ObjectStore, tmp_path: Path, prefix: str) -> None:
    (tmp_path / "out").write_bytes(b"not yours")
    with pytest.raises(StoreError, match="is not a key"):
        list(store.list(prefix))


def test_a_local_write_leaves_no_part_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"content")
    store.put("a/b", b"again")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [info.key for info in store.list()] == ["a/b"]


def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        write_atomically(target, b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="check the folder's permissions"):
        LocalStore(tmp_path / "file").put("key", b"")


def test_written_files_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("uri", "kind", "shown"),
    [
        ("s3://bucket", S3Store, "s3://bucket"),
        ("s3://bucket/a/b/", S3Store, "s3://bucket/a/b"),
        ("folder", LocalStore, None),
    ],
)
def test_the_uri_chooses_the_store(uri: str, kind: type[ObjectStore], shown: str | None) -> None:
    opened = open_store(uri)
    assert isinstance(opened, kind)
    assert opened.uri == (shown or str(Path("folder").resolve()))


@pytest.mark.parametrize("uri", ["gs://bucket", "http://host/x", "s3://", "s3:///key", "s3://bucket?x=1"])
def test_a_uri_of_another_kind_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        open_store(uri)


def test_the_environment_names_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="kintsugi up"):
        store_uri_from_environment()
    monkeypatch.setenv("KINTSUGI_STORE", "s3://bucket/x")
    assert store_uri_from_environment() == "s3://bucket/x"
