from pathlib import Path

import pytest
from pydantic import ValidationError

from kintsugi.errors import ConfigError, ImageError
from kintsugi_serve.schemas import PROBLEMS, Args, Refusal, Settings


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
    with pytest.raises(ValidationError, match="sha256"):
        Args.model_validate({"store": "s3://plant/k", "keys": [{"tenant": "line", "sha256": "secret"}]})


def test_two_entries_of_one_key_are_refused() -> None:
    twice = [{"tenant": tenant, "sha256": "a" * 64} for tenant in ("line-1", "line-2")]
    with pytest.raises(ValidationError, match="take one of the two out"):
        Args.model_validate({"store": "s3://plant/k", "keys": twice})


def test_keys_come_from_a_file_when_the_application_is_built(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    args = Args(store="s3://plant/k", keys_file=str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        args.settings()
    file.write_text(f"keys:\n  - tenant: line-3\n    sha256: {'a' * 64}\n")
    assert [key.tenant for key in args.settings().keys] == ["line-3"]


def test_keys_beside_a_file_of_keys_are_refused() -> None:
    given = {"store": "s3://plant/k", "keys": [{"tenant": "line-3", "sha256": "a" * 64}], "keys_file": "keys.yaml"}
    with pytest.raises(ValidationError, match="take one of the two out"):
        Args.model_validate(given)


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


@pytest.mark.parametrize("code", [code for code, (status, _) in PROBLEMS.items() if status in (429, 503)])
def test_every_429_and_503_says_when_to_come_back(code: str) -> None:
    assert Refusal(code, "later").retry_after_s == 1
    assert Refusal(code, "later", retry_after_s=7).retry_after_s == 7
