"""The commands through the command line, on a store in a folder; what needs a cluster is tested in tests/e2e."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from kintsugi import cli, imaging
from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import ExperimentConfig, with_values
from kintsugi.models import build_model
from kintsugi.registry import Registry
from kintsugi.restore import restorer
from kintsugi.storage import LocalStore


@pytest.fixture
def store(tiny_store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalStore:
    monkeypatch.setenv("KINTSUGI_STORE", tiny_store.uri)
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path / "home"))
    return tiny_store


@pytest.fixture
def model(store: LocalStore, tiny_config: ExperimentConfig, tmp_path: Path) -> str:
    config = with_values(tiny_config, {"data.dataset": "tiny"})
    save_checkpoint(tmp_path / "checkpoint", build_model(config.model), config, {"score": 1.0}, {"dataset_digest": "d"})
    return Registry(store).publish("unet", tmp_path / "checkpoint", b"{}").ref


def run(*words: str) -> int:
    try:
        return cli.main(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_restore_writes_the_same_kind_of_file_and_never_replaces_one_unasked(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.tiff", tmp_path / "out.tiff"
    pixels = (np.random.default_rng(0).random((40, 30)) * 4095).astype(np.uint16)
    source.write_bytes(imaging.encode(imaging.Image(pixels, "tiff", 65535)))
    assert run("restore", str(source), str(target), "--model", model, "--white-level", "4095", "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["model"] == model and 0 <= report["retention"] <= 1
    back = imaging.decode(target.read_bytes())
    assert (back.format, back.size, back.bit_depth) == ("tiff", (40, 30), 16)
    assert run("restore", str(source), str(target), "--model", model) == 1
    assert "--force" in capsys.readouterr().err
    assert run("restore", str(source), str(target), "--model", model, "--force") == 0


def test_a_white_level_below_the_image_is_told(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.png"
    source.write_bytes(imaging.encode(imaging.Image(np.full((8, 8), 5000, np.uint16), "png", 65535)))
    assert run("restore", str(source), str(tmp_path / "out.png"), "--model", model, "--white-level", "4095") == 1
    assert "5000" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_restore_takes_a_checkpoint_folder_and_the_options_of_a_pass(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, folder = tmp_path / "in.png", tmp_path / "out.png", str(tmp_path / "checkpoint")
    source.write_bytes(imaging.encode(imaging.Image(np.full((30, 40), 90, np.uint8))))
    options = ("--model", folder, "--ensemble", "flips", "--tile", "16", "--json")
    assert run("restore", str(source), str(target), *options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"] == folder
    assert run("restore", str(source), str(target), "--model", folder, "--ensemble", "some", "--force") == 1
    assert "dihedral" in capsys.readouterr().err
    assert run("restore", str(source), str(target), "--model", folder, "--defect-map", "map.png", "--force") == 1
    assert "model.mask=predicted" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nothing", "no/such/folder", "unet@staging"])
def test_a_model_that_is_neither_folder_nor_published_is_told(
    model: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("restore", "in.png", str(tmp_path / "out.png"), "--model", name) == 1
    told = capsys.readouterr().err
    assert f"{name} is no checkpoint folder" in told and "Traceback" not in told


def test_without_a_model_the_shipped_weights_are_used(
    tmp_path: Path, tiny_config: ExperimentConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restorer.resources, "files", lambda package: tmp_path / package)
    source = tmp_path / "in.png"
    source.write_bytes(imaging.encode(imaging.Image(np.full((30, 40), 90, np.uint8))))
    assert run("restore", str(source), str(tmp_path / "out.png")) == 1
    assert "comes without weights" in capsys.readouterr().err
    folder = tmp_path / "kintsugi/weights/light"
    save_checkpoint(folder, build_model(tiny_config.model), tiny_config, {"score": 1.0}, {})
    assert run("restore", str(source), str(tmp_path / "out.png")) == 0
    assert imaging.decode((tmp_path / "out.png").read_bytes()).size == (30, 40)


def test_a_start_from_another_model_is_refused_before_anything_starts(
    model: str, tiny_config: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(with_values(tiny_config, {"data.dataset": "tiny"}).to_yaml())
    assert run("train", str(path), "--init-from", model, "--set", "model.residual=false", "--set", "model.base=16") == 1
    told = capsys.readouterr().err
    assert f"model.base (is {tiny_config.model.base} there)" in told and "model.residual" in told
    assert run("train", str(path), "--init-from", "unet@9") == 1
    assert "unet" in capsys.readouterr().err


def test_models_are_promoted_listed_and_shown(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "promote", model) == 0
    assert run("models", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert model in [version["ref"] for version in listed]
    assert run("models", "show", "unet@production", "--json") == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["aliases"]["production"][-1]["action"] == "promote"


def test_evaluate_prints_a_scorecard_and_writes_what_was_asked_for(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--output", str(tmp_path / "card.json"), "--picture", str(tmp_path / "worst.png"))
    assert run("evaluate", model, "--split", "test", *files) == 0
    assert "score +0.00 dB" in capsys.readouterr().out
    assert json.loads((tmp_path / "card.json").read_text())["split"] == "test"
    assert (tmp_path / "worst.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_takes_the_users_own_detector_and_writes_a_report(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "finder_of_mine.py").write_text("def darkness(image):\n    return 1 - image.to_unit()\n")
    monkeypatch.syspath_prepend(tmp_path)
    report = tmp_path / "report.html"
    words = ("evaluate", model, "--detector", "finder_of_mine:darkness", "--report", str(report))
    assert run(*words) == 0
    told = capsys.readouterr().out
    assert "detectability recovered 0%" in told and "defect contrast kept" in told
    assert 'class="strip"' in report.read_text()
    assert run("evaluate", model, "--detector", "finder_of_mine:nothing") == 1
    assert "finder_of_mine:nothing" in capsys.readouterr().err
    assert run("evaluate", model, "--survival", "--limit", "1") == 1
    assert "defect-free" in capsys.readouterr().err


def test_a_detector_is_trained_and_judges_a_checkpoint_folder(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "detector")
    assert run("detector", "train", "tiny", folder, "--steps", "2", "--json") == 0
    card = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert card["steps"] == 2 and card["val_average_precision"] is not None
    assert run("detector", "train", "tiny", folder) == 1
    assert "not empty" in capsys.readouterr().err
    output = tmp_path / "card.json"
    assert run("evaluate", str(tmp_path / "checkpoint"), "--detector", folder, "--output", str(output)) == 0
    scored = json.loads(output.read_text())
    assert scored["model"] == str(tmp_path / "checkpoint") and scored["detectability"]["clean_ap"] is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evaluate", "nothing"), "there is no model 'nothing'"),
        (("evaluate", "nothing", "--split", "half"), "nothing"),
        (("train", "no-such.yaml"), "no-such.yaml"),
        (("data", "inspect", "nothing"), "tiny@"),
        (("data", "build", "odd", ".", "--name", "x"), "odd"),
    ],
)
def test_what_cannot_work_ends_with_one_sentence_and_exit_1(
    store: LocalStore, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 1
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_without_any_store_the_way_to_one_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path))
    assert run("models", "list") == 1
    assert "kintsugi up" in capsys.readouterr().err


def test_every_command_in_the_readme_exists_with_its_options(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = re.findall(r"^kintsugi .*$", (repository / "README.md").read_text(), re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        name = next(name for name in (" ".join(words[:2]), words[0]) if name in cli.COMMANDS)
        assert run(*name.split(), "--help") == 0
        told = capsys.readouterr().out
        assert all(word in told for word in words if word.startswith("--")), line


@pytest.mark.parametrize("key", ["data.crop=64", "train.curriculum=[{epochs: 1, values: {data.crop: 64}}]"])
def test_a_crop_larger_than_the_smallest_image_stops_before_anything_starts(
    key: str, store: LocalStore, tmp_path: Path, tiny_config: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(tiny_config.to_yaml())
    assert run("train", str(path), "--set", key) == 1
    told = capsys.readouterr().err
    assert "data.crop is 64 px" in told and "set data.crop=48 or less, or data.small_images=mirror" in told
