"""`kintsugi restore` with a folder; single images are in test_commands.py, services in tests/serve."""

import json
from pathlib import Path

import numpy as np
import pytest

from kintsugi import cli, imaging
from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import ExperimentConfig
from kintsugi.models import build_model


@pytest.fixture
def checkpoint(tiny_config: ExperimentConfig, tmp_path: Path) -> str:
    save_checkpoint(tmp_path / "checkpoint", build_model(tiny_config.model).eval(), tiny_config, {"score": 1.0}, {})
    return str(tmp_path / "checkpoint")


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `parts` in the working directory: three images of different kinds, and two files that are none."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "parts"
    (folder / "night").mkdir(parents=True)
    pixels = (np.random.default_rng(0).random((24, 30)) * 255).astype(np.uint8)
    (folder / "b.png").write_bytes(imaging.encode(imaging.Image(pixels)))
    (folder / "a.TIFF").write_bytes(imaging.encode(imaging.Image(pixels.astype(np.uint16) * 257, "tiff", 65535)))
    (folder / "night/c.bmp").write_bytes(imaging.encode(imaging.Image(pixels, "bmp")))
    (folder / "notes.txt").write_text("none")
    (folder / ".b.png").write_text("left by another program")
    return folder


def run(*words: str) -> int:
    try:
        return cli.main(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_every_image_of_a_folder_is_restored_in_kind(
    checkpoint: str, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("restore", "parts", "new/out", "--model", checkpoint, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["restored"], told["failed"]) == (3, 0)
    assert [each["output"] for each in told["images"]] == ["new/out/a.TIFF", "new/out/b.png", "new/out/night/c.bmp"]
    for each in told["images"]:
        source, target = (imaging.decode(Path(each[side]).read_bytes()) for side in ("image", "output"))
        assert (source.format, source.size, source.bit_depth) == (target.format, target.size, target.bit_depth)
        assert 0 <= each["retention"] <= 1 and each["model"] == checkpoint
    assert len([path for path in Path("new").rglob("*") if path.is_file()]) == 3


def test_an_image_of_a_folder_gives_the_same_bytes_as_alone(checkpoint: str, parts: Path) -> None:
    assert run("restore", "parts", "out", "--model", checkpoint) == 0
    assert run("restore", "parts/b.png", "alone.png", "--model", checkpoint) == 0
    assert Path("alone.png").read_bytes() == Path("out/b.png").read_bytes()


def test_a_damaged_image_of_a_folder_is_told_and_the_others_go_on(
    checkpoint: str, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (parts / "b.png").write_bytes(b"no image")
    assert run("restore", "parts", "out", "--model", checkpoint) == 1
    told = capsys.readouterr()
    assert "parts/b.png: not a PNG" in told.err and "1 of 3 images were not restored" in told.err
    assert told.out.count("structure kept") == 2
    assert not Path("out/b.png").exists() and Path("out/night/c.bmp").exists()


def test_masks_of_a_folder_have_the_names_of_its_images(
    checkpoint: str, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = parts.parent / "masks"
    masks.mkdir()
    (masks / "b.png").write_bytes(imaging.encode_mask(np.ones((24, 30), np.bool_)))
    assert run("restore", "parts", "out", "--model", checkpoint, "--mask", "masks") == 1
    told = capsys.readouterr().err
    assert "masks/a.TIFF cannot be read" in told and "2 of 3 images" in told
    assert Path("out/b.png").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("parts", "parts/out"), "lies within parts: choose a folder beside it"),
        (("parts", "parts"), "lies within parts"),
        (("parts", "parts/notes.txt"), "is a file: name a folder"),
        (("empty", "out"), "empty holds no PNG, TIFF, JPEG or BMP image"),
        (("parts", "out", "--defect-map", "map.png"), "name one file"),
        (("parts", "out", "--mask", "parts/b.png"), "is no folder"),
        (("parts", "full"), "full/b.png exists: choose another name, or add --force"),
        (("parts", "out", "--api-key-env", "KEY"), "add --endpoint"),
    ],
)
def test_a_folder_that_cannot_work_is_refused_before_a_model_is_loaded(
    words: tuple[str, ...], sentence: str, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("empty", "full"):
        (parts.parent / name).mkdir()
    (parts.parent / "full/b.png").write_bytes(b"mine")
    assert run("restore", *words, "--model", "no/such/model") == 1
    assert sentence in capsys.readouterr().err
    assert (parts.parent / "full/b.png").read_bytes() == b"mine" and not (parts.parent / "out").exists()
