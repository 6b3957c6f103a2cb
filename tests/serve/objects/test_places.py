import threading
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kintsugi.errors import ObjectNotFound, PreconditionFailed, StoreError
from kintsugi.storage import LocalStore, MemoryStore, ObjectInfo, ObjectStore
from kintsugi_serve.access.addresses import S3Address, is_plain
from kintsugi_serve.objects.places import RESERVED, Places, allowed_address, writable_address
from kintsugi_serve.schemas import Refusal

ROOT = "s3://plant/line-1"
STORE = "s3://plant/kintsugi"

ESCAPES = [
    "s3://plant/line-1-evil/a.png",
    "s3://plant/line-1",
    "s3://plant/line-1/",
    "s3://plant/line-10/a.png",
    "s3://plant/other/a.png",
    "s3://plants/line-1/a.png",
    "s3://PLANT/line-1/a.png",
    "s3://plant/LINE-1/a.png",
    "s3://plant/line-1/../other/a.png",
    "s3://plant/line-1/..",
    "s3://plant/line-1/./a.png",
    "s3://plant/line-1/.. /other/a.png",
    "s3://plant/line-1/.../a.png",
    "s3://plant/line-1/ ",
    "s3://plant/./line-1/a.png",
    "s3://plant/line-1//a.png",
    "s3://plant//line-1/a.png",
    "s3:///plant/line-1/a.png",
    "s3://plant/line-1/%2e%2e/other/a.png",
    "s3://plant/line-1/%252e%252e/other/a.png",
    "s3://plant/line-1/%2F..%2Fa.png",
    "s3://plant%2Fline-1/a.png",
    "s3://evil@plant/line-1/a.png",
    "s3://plant@evil/line-1/a.png",
    "s3://plant/line-1/a@b.png",
    "s3://plant/line-1\\..\\other\\a.png",
    "s3://plant/line-1/a\0.png",
    "s3://plant/line-1/a\n.png",
    "s3://plant/line-1/a.png\n",
    "s3://plant/line-1/\u202ea.png",
    "s3://plant/line-1/\u200ba.png",
    "s3://plant/line-1/\ud800.png",
    "s3://plant/line-1/\uff0e\uff0e/other/a.png",
    "s3://plant/line-1/\u2025/other/a.png",
    "s3://plant/line-1/\u2024\u2024/other/a.png",
    "s3://plant/line-1/a\uff0fb.png",
    "s3://plant/line-1/\u2100.png",
    "s3://plant/line-1/\uff052e\uff052e/other/a.png",
    "s3://plant/line-1/a\uff20b.png",
    "s3://plant\uff0fline-1/a.png",
    "s3://pl\uff41nt/line-1/a.png",
    "s3://plant/line-\uff11/a.png",
    "s3://plant/line-1/a.png?versionId=3",
    "s3://plant/line-1/a.png#part",
    "s3://plant:9000/line-1/a.png",
    "s3://plant/line-1/" + "a" * 1100,
    "s3://plant/line-1/" + "\ufdfa" * 200,
    " s3://plant/line-1/a.png",
    "S3://plant/line-1/a.png",
    "s3:plant/line-1/a.png",
    "s3a://plant/line-1/a.png",
    "http://plant/line-1/a.png",
    "https://plant.s3.amazonaws.com/line-1/a.png",
    "http://169.254.169.254/latest/meta-data",
    "s3://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "/etc/passwd",
    "arn:aws:s3:::plant/line-1/a.png",
    "s3://arn:aws:s3:eu-central-1:123456789012:accesspoint/line-1/a.png",
    "",
]
NAMES = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
ANYTHING = st.text(max_size=12) | st.sampled_from(
    ["..", ".", "%2e", "/", "\\", "\uff0e", "\uff0f", "@", "?", " ", "\0"]
)


class Counting(MemoryStore):
    """Notes what is read whole."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        self.read.append(key)
        return super().get_with_etag(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        raise AssertionError("nobody needs a listing to read one object")


def _code(uri: str, *prefixes: str) -> str:
    with pytest.raises(Refusal) as caught:
        allowed_address(uri, prefixes)
    assert caught.value.status == 403
    return caught.value.code


@pytest.mark.parametrize("uri", ESCAPES)
@pytest.mark.parametrize("root", [ROOT, ROOT + "/"])
def test_an_address_that_is_not_plainly_below_a_prefix_is_forbidden(uri: str, root: str) -> None:
    assert _code(uri, root) == "forbidden"


@pytest.mark.parametrize("uri", ["s3://169.254.169.254/a", "s3://plant..evil/a", "s3://plant.-x/a", "s3://plant-.x/a"])
def test_what_is_no_name_of_a_bucket_is_forbidden_even_where_a_prefix_holds_it(uri: str) -> None:
    assert _code(uri, uri.removesuffix("/a")) == "forbidden"


@pytest.mark.parametrize("root", [ROOT, ROOT + "/"])
@pytest.mark.parametrize(
    "key",
    [
        "a.png",
        "in/Teil 7 (öben).tiff",
        unicodedata.normalize("NFD", "öben.tiff"),
        "..a/b..",
        "part=3/x+y.png",
        "検査/部品Ａ½.png",
        "2027-01-01T12:30:01.png",
    ],
)
def test_a_plain_address_below_a_prefix_is_split_at_the_prefix(root: str, key: str) -> None:
    address = allowed_address(f"{ROOT}/{key}", ("s3://elsewhere", root))
    assert (address.root, address.key, address.uri) == (ROOT, key, f"{ROOT}/{key}")


def test_a_whole_bucket_can_be_a_prefix() -> None:
    address = allowed_address("s3://plant/a/b.png", ("s3://plant",))
    assert (address.root, address.key) == ("s3://plant", "a/b.png")


def test_no_prefix_allows_nothing() -> None:
    with pytest.raises(Refusal, match="outside"):
        allowed_address("s3://plant/a.png", ())


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_names_of_letters_and_digits_are_always_allowed_below_the_prefix_and_nowhere_else(names: list[str]) -> None:
    key = "/".join(names)
    assert allowed_address(f"{ROOT}/{key}", (ROOT,)) == S3Address(ROOT, key)
    assert _code(f"{ROOT}{key}", ROOT) == _code(f"s3://plant/{key}", ROOT) == "forbidden"


@given(st.lists(ANYTHING, max_size=8).map("".join), st.sampled_from([ROOT + "/", ROOT, "s3://plant/", "s3://", ""]))
def test_whatever_is_written_behind_a_prefix_is_refused_or_a_key_of_named_parts(tail: str, start: str) -> None:
    try:
        address = allowed_address(start + tail, (ROOT,))
    except Refusal:
        return
    assert address.uri == start + tail and address.uri.startswith(ROOT + "/")
    for reading in (address.key, unicodedata.normalize("NFKC", address.key)):
        assert all(part.strip(" .") for part in reading.split("/"))
        assert {"%", "\\", "@", "?", "#", "\0", "\n"}.isdisjoint(reading)


@given(st.text())
def test_any_text_is_plain_or_not_and_never_an_error(text: str) -> None:
    assert is_plain(text) in (True, False)


@pytest.mark.parametrize("prefixes", [(STORE,), ("s3://plant",), (STORE + "/",)])
@pytest.mark.parametrize("store", [STORE, STORE + "/", "s3://plant//kintsugi"])
@pytest.mark.parametrize("name", RESERVED)
def test_nothing_can_be_written_among_the_stores_own_areas_though_they_can_be_read(
    name: str, store: str, prefixes: tuple[str, ...]
) -> None:
    for uri in (f"{STORE}/{name}/x.png", f"{STORE}/{name}", f"{STORE}/{name.upper()}/x", f"{STORE}/{name}./x"):
        with pytest.raises(Refusal, match=name) as caught:
            writable_address(uri, prefixes, store)
        assert caught.value.status == 403
        assert allowed_address(uri, prefixes).uri == uri
    for uri in (f"{STORE}/{name}-2/x.png", f"{STORE}/in/{name}/x.png"):
        assert writable_address(uri, prefixes, store).uri == uri


def test_letters_that_some_file_systems_take_for_others_open_no_area() -> None:
    for name in ("ｍodels", "model\u017f", "MODELS", "runs ", "result\u24e2"):
        with pytest.raises(Refusal, match="of the store"):
            writable_address(f"{STORE}/{name}/x.png", (STORE,), STORE)


def test_a_store_in_a_folder_closes_nothing_in_s3() -> None:
    assert writable_address("s3://plant/models/x.png", ("s3://plant",), "/data/plant").key == "models/x.png"


def test_an_area_of_the_store_is_closed_to_readers_whose_prefix_does_not_hold_it() -> None:
    assert _code(f"{STORE}/models/unet/versions/1/weights.safetensors", ROOT, f"{STORE}/in/") == "forbidden"
    assert _code(f"{STORE}/results/line-2/{'0' * 64}", ROOT, f"{STORE}/results/line-1") == "forbidden"


def _places(store: ObjectStore, limit: int = 1000) -> Places:
    return Places(STORE, lambda root: store, max_bytes=limit)


def test_an_object_is_read_by_its_address() -> None:
    store = Counting()
    store.put("in/a.png", b"image")
    store.put("in/a.png.bak", b"other")
    assert _places(store).read(S3Address(ROOT, "in/a.png")) == b"image"


def test_an_object_that_is_too_large_is_not_read() -> None:
    store = Counting()
    store.put("a", bytes(11))
    with pytest.raises(Refusal, match="11 bytes, more than 10") as caught:
        _places(store, limit=10).read(S3Address(ROOT, "a"))
    assert caught.value.code == "too_large"
    assert store.read == []


def test_an_object_that_is_not_there_is_named() -> None:
    with pytest.raises(Refusal, match=f"there is no {ROOT}/a") as caught:
        _places(MemoryStore()).read(S3Address(ROOT, "a"))
    assert caught.value.code == "not_found"


def test_an_object_that_goes_away_after_its_size_was_told_is_not_found() -> None:
    class Fading(MemoryStore):
        def size(self, key: str) -> int:
            return 3

    with pytest.raises(Refusal) as caught:
        _places(Fading()).read(S3Address(ROOT, "a"))
    assert caught.value.code == "not_found"


def test_a_store_that_refuses_is_not_taken_for_a_missing_object() -> None:
    class Closed(MemoryStore):
        def size(self, key: str) -> int:
            raise StoreError("refused the credentials")

    with pytest.raises(StoreError, match="credentials"):
        _places(Closed()).read(S3Address(ROOT, "a"))


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_an_object_is_written_once_and_never_over_other_bytes(kind: str, tmp_path: Path) -> None:
    store = MemoryStore() if kind == "memory" else LocalStore(tmp_path)
    places, address = _places(store), S3Address(ROOT, "out/a.png")
    assert places.write_once(address, b"image") is True
    assert places.write_once(address, b"image") is False
    for other in (b"imagf", b"longer than the image", b""):
        with pytest.raises(Refusal, match="choose another") as caught:
            places.write_once(address, other)
        assert caught.value.code == "conflict"
    assert store.get("out/a.png") == b"image"


def test_a_large_object_in_the_way_is_not_read_to_see_that_it_differs() -> None:
    store = Counting()
    store.put("out", bytes(1000))
    with pytest.raises(Refusal):
        _places(store).write_once(S3Address(ROOT, "out"), b"image")
    assert store.read == []


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_exactly_one_of_fifty_writers_creates_the_object(kind: str, tmp_path: Path) -> None:
    store = MemoryStore() if kind == "memory" else LocalStore(tmp_path)
    places, together = _places(store), threading.Barrier(50)

    def write(_: int) -> bool:
        together.wait()
        return places.write_once(S3Address(ROOT, "out"), b"image")

    with ThreadPoolExecutor(50) as pool:
        assert sum(pool.map(write, range(50))) == 1
    assert store.get("out") == b"image"


def test_a_write_that_s3_refused_for_another_that_then_failed_is_done_again() -> None:
    class Contended(MemoryStore):
        refusals = 2

        def put(
            self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
        ) -> None:
            if self.refusals:
                self.refusals -= 1
                raise PreconditionFailed("ConditionalRequestConflict")
            super().put(key, data, if_none_match=if_none_match, if_match=if_match)

    store = Contended()
    with pytest.raises(ObjectNotFound):
        store.get("out")
    assert _places(store).write_once(S3Address(ROOT, "out"), b"image") is True
    assert store.get("out") == b"image"


def test_a_prefix_is_opened_once_and_only_when_it_is_used() -> None:
    opened: list[str] = []
    stores = {root: MemoryStore({"a": root.encode()}) for root in (ROOT, "s3://plant/line-2")}

    def open_root(root: str) -> ObjectStore:
        opened.append(root)
        return stores[root]

    places = Places(STORE, open_root)
    assert opened == []
    address = places.readable(f"{ROOT}/a", (ROOT + "/", "s3://plant/line-2"))
    assert places.read(address) == places.read(address) == ROOT.encode()
    assert places.read(places.readable("s3://plant/line-2/a", ("s3://plant/line-2",))) == b"s3://plant/line-2"
    assert opened == [ROOT, "s3://plant/line-2"]
    with pytest.raises(Refusal):
        places.writable(f"{STORE}/runs/x", (STORE,))
