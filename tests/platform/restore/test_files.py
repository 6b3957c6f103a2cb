import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from kintsugi import imaging
from kintsugi.config import ExperimentConfig, with_values
from kintsugi.errors import ConfigError, ImageError, StoreError
from kintsugi.imaging import Image
from kintsugi.models import build_model
from kintsugi.restore import files
from kintsugi.restore.files import MapName, restore_file
from kintsugi.restore.restorer import Restorer, RestoreSettings


@pytest.fixture
def restorer(tiny_config: ExperimentConfig) -> Restorer:
    values = {"model.mask": "predicted", "loss.mask": 0.1, "data.mask_dropout": 0.0, "model.attention_window": 32}
    values |= {"model.error": True, "loss.error": 0.5}
    torch.manual_seed(0)
    model = build_model(with_values(tiny_config, values).model).eval()
    model.background_head.weight.data.normal_(0, 0.05)
    return Restorer(model, settings=RestoreSettings(tile=64))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every TIFF counts as large."""
    monkeypatch.setattr(files, "STREAM_ABOVE", 0)


def _image(path: Path, kind: imaging.Format = "tiff") -> Path:
    pixels = np.random.default_rng(0).integers(0, 4096, (140, 90)).astype(np.uint16)
    path.write_bytes(imaging.encode(Image(pixels, kind, 65535)))
    return path


@pytest.mark.parametrize("map_name", ["map.png", "map.tiff"])
def test_a_large_tiff_gives_in_strips_what_it_gives_whole(
    restorer: Restorer, tmp_path: Path, map_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, mask = _image(tmp_path / "in.tiff"), tmp_path / "mask.tiff"
    tifffile.imwrite(mask, np.eye(140, 90, dtype=np.uint8), photometric="minisblack")
    reports, answers, told = [], [], []
    for above, name in ((2**24, "whole"), (0, "strips")):
        monkeypatch.setattr(files, "STREAM_ABOVE", above)
        target = tmp_path / f"{name}.tiff"
        maps: dict[MapName, Path] = {
            "defect_map": tmp_path / f"{name}-defect-{map_name}", "error_bound": tmp_path / f"{name}-error-{map_name}"
        }  # fmt: skip
        reports.append(
            restore_file(
                restorer,
                source,
                target,
                mask=mask,
                white_level=4095,
                maps=maps,
                progress=lambda done, total: told.append((done, total)),
            )
        )
        answers.append([imaging.decode(path.read_bytes()) for path in (target, *maps.values())])
    assert reports[0] == reports[1] and told[-1] == (140, 140)
    for whole, strips in zip(*answers, strict=True):
        np.testing.assert_array_equal(whole.pixels, strips.pixels)
        assert whole.tags == strips.tags and whole.size == (140, 90)
    assert [image.bit_depth for image in answers[0]] == [16, 8, 16] and answers[0][2].pixels.max() > 0
    assert not np.array_equal(answers[0][0].pixels, imaging.decode(source.read_bytes()).pixels)


@pytest.mark.usefixtures("streamed")
def test_memory_does_not_grow_with_the_height(
    restorer: Restorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kintsugi.trust.report.BLOCK_PIXELS", 128 * 128)
    monkeypatch.setattr("kintsugi.restore.strips._STRIP_BYTES", 2**13)
    restorer.settings = RestoreSettings(tile=128, halo=16)
    peaks: list[int] = []
    for height in (256, 256, 1536):  # The first takes what stays for good.
        pixels = np.random.default_rng(0).integers(0, 4096, (height, 128)).astype(np.uint16)
        tifffile.imwrite(tmp_path / "in.tiff", pixels, rowsperstrip=64)
        tracemalloc.start()
        restore_file(restorer, tmp_path / "in.tiff", tmp_path / "out.tiff")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]


@pytest.mark.parametrize("kind", ["png", "bmp"])
@pytest.mark.usefixtures("streamed")
def test_other_formats_are_restored_in_kind(restorer: Restorer, tmp_path: Path, kind: imaging.Format) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    (tmp_path / "in").write_bytes(imaging.encode(Image(pixels, kind)))
    restore_file(restorer, tmp_path / "in", tmp_path / "out")
    back = imaging.decode((tmp_path / "out").read_bytes())
    assert (back.format, back.pixels.shape) == (kind, pixels.shape)


@pytest.mark.usefixtures("streamed")
def test_a_value_above_the_white_level_leaves_no_file(restorer: Restorer, tmp_path: Path) -> None:
    pixels = np.zeros((300, 40), np.uint16)
    pixels[290] = 65535
    tifffile.imwrite(tmp_path / "in.tiff", pixels, photometric="minisblack", rowsperstrip=10)
    with pytest.raises(ImageError, match="65535"):
        restore_file(restorer, tmp_path / "in.tiff", tmp_path / "out.tiff", white_level=4095)
    assert [path.name for path in tmp_path.iterdir()] == ["in.tiff"]


@pytest.mark.usefixtures("streamed")
def test_a_tiff_that_cannot_be_read_in_strips_is_restored_whole(restorer: Restorer, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "in.tiff", pixels, photometric="minisblack", compression="jpeg")
    restore_file(restorer, tmp_path / "in.tiff", tmp_path / "out.tiff")
    assert imaging.decode((tmp_path / "out.tiff").read_bytes()).size == (64, 64)


def test_a_model_that_predicts_no_map_says_so_before_it_works(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    worker = Restorer(build_model(tiny_config.model).eval())
    source, target = _image(tmp_path / "in.tiff"), tmp_path / "out.tiff"
    with pytest.raises(ConfigError, match="predicts no defect map"):
        restore_file(worker, source, target, maps={"defect_map": tmp_path / "map.png"})
    assert not target.exists()


def test_a_map_that_is_no_picture_is_refused(restorer: Restorer, tmp_path: Path) -> None:
    source = _image(tmp_path / "in.tiff")
    with pytest.raises(ConfigError, match="PNG or a TIFF"):
        restore_file(restorer, source, tmp_path / "out.tiff", maps={"defect_map": tmp_path / "map.csv"})


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_folder_that_is_not_there_is_told(restorer: Restorer, tmp_path: Path, kind: imaging.Format) -> None:
    source = _image(tmp_path / "in", kind)
    for where in ((source, tmp_path / "no" / "out"), (tmp_path / "absent", tmp_path / "out")):
        with pytest.raises(StoreError, match="check the"):
            restore_file(restorer, *where)
