"""kintsugi export through the command line."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kintsugi import cli
from kintsugi.checkpoint import load_checkpoint, save_checkpoint
from kintsugi.config import parse_config
from kintsugi.models import build_model
from kintsugi.registry import Registry
from kintsugi.storage import LocalStore

TINY = {"channels": 1, "base": 8, "levels": 1, "norm": "none", "mask": "none", "residual": False}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint folder, also published as unet@1."""
    monkeypatch.setenv("KINTSUGI_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path / "home"))
    config = parse_config({"model": TINY})
    save_checkpoint(tmp_path / "model", build_model(config.model), config, {"score": 1.0}, {"dataset_digest": "d"})
    Registry(LocalStore(tmp_path / "store")).publish("unet", tmp_path / "model", b"{}")
    return tmp_path / "model"


def test_a_folder_and_a_published_model_are_exported_and_described(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.onnx"
    with monkeypatch.context() as bare:
        bare.setitem(sys.modules, "onnxruntime", None)
        assert cli.main(["export", str(model), str(target)]) == 0
    told = capsys.readouterr().out
    assert "image: float32 (batch, 1, height, width)" in told and "any from 2 px on" in told
    assert "pools over its whole input: of images above 512 x 512 px" in told
    assert "not compared with 'kintsugi restore': pip install onnxruntime" in told

    before = target.read_bytes()
    assert cli.main(["export", "unet@1", str(target), "--json"]) == 1
    assert "--force" in capsys.readouterr().err
    assert target.read_bytes() == before

    assert cli.main(["export", "unet@1", str(target), "--json", "--force", "--size", "16x24"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == str(target)
    assert document["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert (document["model"], document["opset"], document["pools_over_input"]) == ("unet@1", 18, True)
    assert document["inputs"] == {"image": ["batch", 1, 16, 24]} and document["outputs"] == {
        "restored": ["batch", 1, 16, 24]
    }
    assert "Conv" in document["operators"] and document["max_difference"] <= 1e-4
    assert document["digest"] != load_checkpoint(model).digest  # A published version has a scorecard too.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing@3", "out.onnx"], "nothing@3 is no checkpoint folder, and no published model either"),
        (["MODEL", "out.pb"], "out.pb must end in .onnx"),
        (["MODEL", "no/such/out.onnx"], "there is no folder no/such: make it first"),
        (["MODEL", "out.onnx", "--opset", "9"], "the opset must be one of 17 to 23 (got 9)"),
        (["MODEL", "out.onnx", "--size", "512"], "give height and width in px, for example 512x640"),
        (["MODEL", "out.onnx", "--size", "0x5"], "height and width must be at least 1 px (got 0x5)"),
        (["MODEL", "out.onnx", "--mask"], "this model takes no mask (model.mask=none)"),
    ],
)
def test_bad_input_is_one_sentence(
    model: Path,
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found = sorted(tmp_path.iterdir())
    assert cli.main(["export", *(word.replace("MODEL", "model") for word in words)]) == 1
    answer = capsys.readouterr().err
    assert told in answer and "Traceback" not in answer
    assert sorted(tmp_path.iterdir()) == found


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_what_installs_it(
    model: Path, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["export", str(model), str(tmp_path / "out.onnx")]) == 1
    told = capsys.readouterr().err
    assert package in told and "pip install onnx onnxscript" in told
