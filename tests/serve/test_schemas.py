import pytest
from pydantic import ValidationError

from kintsugi.errors import ImageError
from kintsugi_serve.schemas import PROBLEMS, Args, Refusal, Settings, allowed_address, writable_address

ROOT = "s3://plant/line-1"

ESCAPES = [
    "s3://plant/line-1-evil/a.png",
    "s3://plant/line-1",
    "s3://plant/line-1/",
    "s3://plant/line-10/a.png",
    "s3://plant/other/a.png",
    "s3://plants/line-1/a.png",
    "s3://PLANT/line-1/a.png",
    "s3://plant/line-1/../other/a.png",
    "s3://plant/line-1/..",
    "s3://plant/line-1/./a.png",
    "s3://plant/./line-1/a.png",
    "s3://plant/line-1//a.png",
    "s3://plant//line-1/a.png",
    "s3:///plant/line-1/a.png",
    "s3://plant/line-1/%2e%2e/other/a.png",
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
    "s3://plant/line-1/a.png?versionId=3",
    "s3://plant/line-1/a.png#part",
    "s3://plant:9000/line-1/a.png",
    "s3://plant/line-1/" + "a" * 1100,
    " s3://plant/line-1/a.png",
    "S3://plant/line-1/a.png",
    "s3:plant/line-1/a.png",
    "http://plant/line-1/a.png",
    "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "/etc/passwd",
    "arn:aws:s3:::plant/line-1/a.png",
    "",
]


@pytest.mark.parametrize("uri", ESCAPES)
def test_an_address_that_is_not_plainly_below_a_root_is_forbidden(uri: str) -> None:
    with pytest.raises(Refusal) as caught:
        allowed_address(uri, (ROOT,))
    assert (caught.value.code, caught.value.status) == ("forbidden", 403)


@pytest.mark.parametrize("root", [ROOT, ROOT + "/"])
@pytest.mark.parametrize("key", ["a.png", "in/Teil 7 (öben).tiff", "..a/b..", "part=3/x+y.png"])
def test_a_plain_address_below_a_root_is_split_at_the_root(root: str, key: str) -> None:
    address = allowed_address(f"{ROOT}/{key}", ("s3://elsewhere", root))
    assert (address.root, address.key) == (ROOT, key)


def test_a_whole_bucket_can_be_a_root() -> None:
    address = allowed_address("s3://plant/a/b.png", ("s3://plant",))
    assert (address.root, address.key) == ("s3://plant", "a/b.png")


def test_no_root_allows_nothing() -> None:
    with pytest.raises(Refusal, match="outside"):
        allowed_address("s3://plant/a.png", ())


@pytest.mark.parametrize("roots", [None, ("s3://plant",), ("s3://plant/kintsugi",)])
@pytest.mark.parametrize("name", ["models", "datasets", "runs"])
def test_results_cannot_be_written_among_the_stores_own_folders(name: str, roots: tuple[str, ...] | None) -> None:
    settings = Settings(store="s3://plant/kintsugi", s3_roots=roots)
    for uri in (f"s3://plant/kintsugi/{name}/x.png", f"s3://plant/kintsugi/{name}"):
        with pytest.raises(Refusal) as caught:
            writable_address(uri, settings)
        assert caught.value.status == 403
    assert writable_address(f"s3://plant/kintsugi/{name}-2/x.png", settings).key.endswith("x.png")


def test_the_store_is_the_root_where_none_is_given() -> None:
    assert Settings(store="s3://plant/kintsugi").roots == ("s3://plant/kintsugi",)
    assert Settings(store="/data/store").roots == ()


@pytest.mark.parametrize("root", ["plant", "s3://", "s3://plant/../x", "s3://plant//x", "s3://pl%61nt/x", "file:///x"])
def test_a_root_that_is_no_address_is_refused(root: str) -> None:
    with pytest.raises(ValidationError, match="s3_roots"):
        Settings(store="s3://plant/kintsugi", s3_roots=(root,))


def test_the_store_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINTSUGI_STORE", "s3://plant/kintsugi")
    assert Args().store == "s3://plant/kintsugi"


def test_more_replicas_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_replicas"):
        Args(store="s3://plant/k", min_replicas=3, max_replicas=2)


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValidationError, match="extra"):
        Args.model_validate({"store": "s3://plant/k", "max_replica": 2})


def test_a_key_that_is_not_a_hash_is_refused() -> None:
    with pytest.raises(ValidationError, match="api_key_sha256"):
        Args(store="s3://plant/k", api_key_sha256=("secret",))


def test_a_gpu_moves_the_model_to_cuda_unless_told_otherwise() -> None:
    assert Args(store="s3://plant/k", num_gpus=0.5).settings().device == "cuda"
    assert Args(store="s3://plant/k", num_gpus=1, device="cuda:0").settings().device == "cuda:0"
    assert Args(store="s3://plant/k").settings().device == "cpu"


def test_every_documented_image_error_has_a_status() -> None:
    documented = (ImageError.__doc__ or "").split("one of")[1].replace("\n", " ")
    codes = {word.strip(" `.") for word in documented.split(",")}
    assert len(codes) >= 7
    assert codes <= PROBLEMS.keys()
    assert all(400 <= PROBLEMS[code][0] < 500 for code in codes)


@pytest.mark.parametrize("code", [code for code, (status, _) in PROBLEMS.items() if status == 503])
def test_every_503_says_when_to_come_back(code: str) -> None:
    assert Refusal(code, "later").retry_after_s == 1
