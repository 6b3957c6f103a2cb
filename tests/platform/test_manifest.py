from pathlib import Path

import pytest

from kintsugi.errors import IntegrityError, ObjectNotFound, PreconditionFailed, StoreError, StoreUnavailable
from kintsugi.manifest import MANIFEST, FileEntry, Manifest, get_folder, make_manifest, put_folder, read_manifest
from kintsugi.storage import LocalStore, MemoryStore, ObjectStore, sha256

FILES = {"weights.bin": b"\x00\x01\x02" * 100, "config.yaml": b"a: 1\n", "shards/0.parquet": b"PAR1"}


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_published_folder_comes_back_byte_for_byte(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    manifest = make_manifest(folder, "model", {"name": "unet"})
    put_folder(store, "models/unet/1", folder, manifest)
    fetched = get_folder(store, "models/unet/1", tmp_path / "back")
    assert fetched == manifest
    contents = _contents(tmp_path / "back")
    assert Manifest.model_validate_json(contents.pop(MANIFEST)) == manifest
    assert contents == FILES


class Torn(MemoryStore):
    """A store whose connection is lost at the n-th write."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self.writes = writes

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        if self.writes == 0:
            raise StoreUnavailable("the connection is lost")
        self.writes -= 1
        super().put(key, data, if_none_match=if_none_match, if_match=if_match)


class TornTransfers(MemoryStore):
    """A store whose first downloads arrive with a flipped bit."""

    def __init__(self, torn: int) -> None:
        super().__init__()
        self.torn, self.downloads = torn, 0

    def download(self, key: str, path: Path) -> None:
        self.downloads += 1
        data = bytearray(self.get(key))
        data[0] ^= self.downloads <= self.torn
        path.write_bytes(data)


def test_a_torn_transfer_is_begun_anew(folder: Path, tmp_path: Path) -> None:
    store = TornTransfers(torn=2)
    put_folder(store, "p", folder, make_manifest(folder, "model"))
    get_folder(store, "p", tmp_path / "back")
    assert _contents(tmp_path / "back").keys() == {*FILES, MANIFEST}
    assert store.downloads == len(FILES) + 2


def test_a_file_that_always_arrives_with_other_bytes_is_an_error_after_three_transfers(
    folder: Path, tmp_path: Path
) -> None:
    store = TornTransfers(torn=9)
    put_folder(store, "p", folder, make_manifest(folder, "model"))
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        get_folder(store, "p", tmp_path / "back")
    assert store.downloads == 3


@pytest.mark.parametrize("writes", range(len(FILES) + 1))
def test_a_torn_upload_is_invisible(folder: Path, tmp_path: Path, writes: int) -> None:
    store = Torn(writes)
    with pytest.raises(StoreUnavailable):
        put_folder(store, "p", folder, make_manifest(folder, "model"))
    with pytest.raises(ObjectNotFound):
        get_folder(store, "p", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", [0, -1])
def test_a_flipped_bit_in_any_file_is_found(
    store: ObjectStore, folder: Path, tmp_path: Path, name: str, at: int
) -> None:
    put_folder(store, "p", folder, make_manifest(folder, "model"))
    damaged = bytearray(FILES[name])
    damaged[at] ^= 1
    store.put(f"p/{name}", bytes(damaged))
    with pytest.raises(IntegrityError, match=name):
        get_folder(store, "p", tmp_path / "back")
    assert not (tmp_path / "back" / name).exists()


def test_a_missing_file_is_found(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    put_folder(store, "p", folder, make_manifest(folder, "model"))
    store.delete("p/config.yaml")
    with pytest.raises(IntegrityError, match=r"config\.yaml is missing"):
        get_folder(store, "p", tmp_path / "back")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"kind": "model"}'])
def test_a_damaged_manifest_is_refused(store: ObjectStore, damage: bytes) -> None:
    store.put(f"p/{MANIFEST}", damage)
    with pytest.raises(IntegrityError, match="is damaged"):
        read_manifest(store, "p")


def test_the_second_publisher_of_a_prefix_fails_and_changes_nothing(
    store: ObjectStore, folder: Path, tmp_path: Path
) -> None:
    first = make_manifest(folder, "model")
    put_folder(store, "p", folder, first, create_only=True)
    (folder / "weights.bin").write_bytes(b"other")
    with pytest.raises(PreconditionFailed):
        put_folder(store, "p", folder, make_manifest(folder, "model"), create_only=True)
    assert get_folder(store, "p", tmp_path / "back") == first


def test_the_second_publisher_fails_even_with_other_file_names(
    store: ObjectStore, folder: Path, tmp_path: Path
) -> None:
    put_folder(store, "p", folder, make_manifest(folder, "model"), create_only=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "elsewhere.bin").write_bytes(b"")
    with pytest.raises(PreconditionFailed):
        put_folder(store, "p", tmp_path / "other", make_manifest(tmp_path / "other", "model"), create_only=True)
    assert set(read_manifest(store, "p").files) == set(FILES)


def test_a_manifest_that_names_a_path_outside_the_folder_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    entry = FileEntry(size=1, sha256=sha256(b"x"))
    evil = Manifest(kind="model", created="", files={"../out": entry})
    store.put(f"p/{MANIFEST}", evil.model_dump_json().encode())
    with pytest.raises(StoreError, match="is not a key"):
        get_folder(store, "p", tmp_path / "back")
    assert not (tmp_path / "out").exists()


def test_the_digest_is_of_names_and_contents_alone(folder: Path) -> None:
    one, two = make_manifest(folder, "model"), make_manifest(folder, "dataset", {"note": "later"})
    assert one.digest == two.digest
    (folder / "config.yaml").rename(folder / "renamed.yaml")
    assert make_manifest(folder, "model").digest != one.digest


def test_only_the_folders_own_manifest_is_left_out_of_it(folder: Path) -> None:
    (folder / MANIFEST).write_text("{}")
    (folder / "shards" / MANIFEST).write_text("{}")
    assert set(make_manifest(folder, "model").files) == {*FILES, f"shards/{MANIFEST}"}
