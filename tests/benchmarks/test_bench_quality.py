"""The quality benchmark on a few tiny drawn tiles; its figures on real ones are not a test's business."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import parse_config
from kintsugi.detection.segmenter import Segmenter, SegmenterCard, SegmenterNet
from kintsugi.models import build_model

HERE = Path(__file__).parent

TINY = {"channels": 1, "base": 8, "levels": 2, "skips": [True, True], "mask": "none"}
DEGRADE = """
import numpy as np

def motion_kernel(length, angle):
    return np.full((1, int(length)), 1 / int(length), np.float32)

def disk_kernel(radius):
    return np.full((3, 3), 1 / 9, np.float32)

def degrade(clean, name, preset):
    blurred = preset == "kla"
    image = (clean + np.roll(clean, 1, 1) + np.roll(clean, -1, 1)) / 3 if blurred else clean
    noise = np.random.default_rng(len(name)).normal(0, 0.05, clean.shape)
    parameters = dict(L=3 * blurred, ang=0.0, defocus=0.0, gain=0.9, offset=0.05, peak=0.0, sigma=0.05, jpeg=0)
    return np.rint(np.clip(0.9 * image + 0.05 + noise, 0, 1) * 255).astype(np.uint8), parameters
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[list[str]], int]]:
    before, loaded = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(HERE))
    try:
        yield importlib.import_module("bench_quality").main
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - loaded:
            if name.startswith(("quality_", "bench_quality")):
                del sys.modules[name]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tiles, three with a dark square, in each split, two of each part."""
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "degrade.py").write_text(DEGRADE)
    made: dict[str, Any] = {}
    exec(DEGRADE, made)
    rows = ["split,group,name,category,role,preset"]
    for split in ("train", "val", "test"):
        for place in ("clean", "degraded", "mask"):
            (folder / split / place).mkdir(parents=True)
        for index in range(6):
            name = f"{split}{'x' * index}"
            generator = np.random.default_rng(index)
            pixels = np.clip(150 + 6 * generator.standard_normal((96, 80)), 0, 255).astype(np.uint8)
            mask = np.zeros(pixels.shape, np.uint8)
            if index % 2:
                mask[40:52, 30:42] = 255
                pixels[mask > 0] //= 3
                cv2.imwrite(str(folder / split / "mask" / f"{name}_mask.png"), mask)
            cv2.imwrite(str(folder / split / "clean" / f"{name}.png"), pixels)
            degraded, _ = made["degrade"](pixels.astype(np.float32) / 255, name, "noise")
            cv2.imwrite(str(folder / split / "degraded" / f"{name}.png"), degraded)
            rows.append(f"{split},{split}{index // 2},{name},{'Break,defect' if index % 2 else 'Free,free'},noise")
    (folder / "manifest.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    card = SegmenterCard(
        width=4, steps=0, seed=0, crop=64, batch=1, train_images=1, train_defect_images=1, val_images=1,
        val_average_precision=0.125,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("detector")
    Segmenter(SegmenterNet(4), card).save(folder)
    return folder


def _rows(output: Path) -> dict[str, dict[str, Any]]:
    return {row["figure"]: row for row in json.loads(output.read_text())}


def test_a_missing_folder_is_said_and_is_no_failure(bench, tmp_path: Path, capsys) -> None:
    output = tmp_path / "quality.json"
    assert bench([str(tmp_path / "nothing"), "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())
    assert row["value"] is None and row["holds"] is None
    assert row["note"].startswith("skipped:")
    assert "skipped:" in capsys.readouterr().out


def test_every_classical_method_gets_its_rows(bench, tiles: Path, detector: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "quality.json"
    methods = ["degraded", "bilateral", "nlm", "nlm+rl", "wiener"]
    arguments = [str(tiles), "--detector", str(detector), "--survival-images", "1", "--output", str(output)]
    assert bench([*arguments, "--methods", *methods]) == 0
    rows = _rows(output)
    assert set(next(iter(rows.values()))) == {"figure", "value", "unit", "goal", "holds", "n", "note"}
    for where in ("assigned presets", "kla"):
        before = rows[f"degraded: {where}: PSNR"]["value"]
        assert all(rows[f"{method}: {where}: PSNR"]["value"] > before for method in methods[1:])
        assert rows[f"nlm: {where}: defect PSNR"]["n"] == 3
        assert "over 3 parts" in rows[f"nlm: {where}: PSNR"]["note"]
        assert rows[f"nlm: {where}: hallucination rate"]["n"] == 3
        assert "clean val images 0.12" in rows[f"nlm: {where}: defects found"]["note"]
        assert rows[f"degraded: {where}: detectability recovered"]["value"] in (0, None)
    assert rows["degraded: clean input: PSNR to the input"]["value"] == 100
    assert all(row["goal"] is None for row in rows.values())
    assert "nlm, blind: planted spots, noise: contrast kept at 8 px" in rows
    assert (tmp_path / "out" / "quality-survival.json").is_file()
    assert (tmp_path / "out" / "quality-survival-kla.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_has_goals_to_meet(bench, tiles: Path, tmp_path: Path) -> None:
    config = parse_config({"data": {"dataset": "tiles"}, "model": TINY})
    folder = tmp_path / "own"
    save_checkpoint(folder, build_model(config.model), config, {"score": 0.0}, {})
    output = tmp_path / "quality.json"
    arguments = ["--limit", "2", "--methods", "own", "--survival-images", "1", "--output", str(output)]
    assert bench([str(tiles), "--checkpoint", f"own={folder}", "--detector", str(tmp_path / "none"), *arguments]) == 0
    rows = _rows(output)
    assert rows["own: assigned presets: PSNR"]["goal"] == ">= 31.2"
    assert isinstance(rows["own: assigned presets: PSNR"]["holds"], bool)
    assert rows["own: kla: worst category's PSNR"]["note"].startswith("category ")
    assert 0 <= rows["own: planted spots, kla: not below non-local means"]["value"] <= 1


def test_a_shortened_run_says_so_in_every_row(bench, tiles: Path, tmp_path: Path) -> None:
    output = tmp_path / "quality.json"
    arguments = ["--limit", "2", "--methods", "degraded", "--survival-images", "0", "--output", str(output)]
    assert bench([str(tiles), "--detector", str(tmp_path / "none"), *arguments]) == 0
    rows = _rows(output)
    assert all("shortened: 2 of 6 test images" in row["note"] for row in rows.values())
    absent = rows["degraded: kla: detectability recovered"]
    assert absent["value"] is None and "--train-detector" in absent["note"]


def test_an_unknown_method_is_named(bench, tiles: Path, tmp_path: Path, capsys) -> None:
    arguments = [str(tiles), "--methods", "magic", "--output", str(tmp_path / "quality.json")]
    assert bench(arguments) == 1
    assert "magic" in capsys.readouterr().err
