from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import ExperimentConfig, with_values
from kintsugi.errors import Abandoned, ConfigError, ImageError, IntegrityError, KintsugiError
from kintsugi.imaging import Image, decode, encode
from kintsugi.models import build_model
from kintsugi.restore.restorer import Restoration, Restorer, RestoreSettings
from kintsugi.restore.sources import WholeMask
from kintsugi.restore.tiling import Ensemble
from kintsugi.trust.judge import TrustLimits, fit_profile
from kintsugi.trust.report import CALIBRATION, Calibration, save_calibration


def restorer(config: ExperimentConfig, settings: RestoreSettings | None = None) -> Restorer:
    """A model whose last layers are not zero, so that it changes its input by 0.1 on the average."""
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    heads = (model.background_head.weight.data, model.defect_head.weight.data)
    probe = torch.rand(1, config.model.channels, 64, 64)
    for weight in heads:
        weight.normal_()
    with torch.inference_mode():
        change = (model(probe, probe[:, :1]).image - probe).abs().mean()
    for weight in heads:
        weight *= 0.1 / change
    return Restorer(model, settings=settings or RestoreSettings())


def picture(dtype: type, shape: tuple[int, ...] = (61, 45), white_level: int | None = None) -> Image:
    top = int(np.iinfo(dtype).max) if white_level is None else white_level
    pixels = np.random.default_rng(0).integers(0, top + 1, shape).astype(dtype)
    return Image(pixels, "png", top)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(61, 45), (61, 45, 3), (1, 1), (7, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_size_depth_and_colour_mode_stay(
    tiny_config: ExperimentConfig, dtype: type, shape: tuple[int, ...], channels: int
) -> None:
    image = picture(dtype, shape)
    answer = restorer(with_values(tiny_config, {"model.channels": channels})).restore(image).image
    assert (answer.pixels.shape, answer.pixels.dtype) == (image.pixels.shape, image.pixels.dtype)
    assert (answer.format, answer.white_level) == (image.format, image.white_level)
    assert image.size == (1, 1) or not np.array_equal(answer.pixels, image.pixels)


def test_a_12_bit_image_in_16_stays_below_its_white_level(tiny_config: ExperimentConfig) -> None:
    answer = restorer(tiny_config).restore(picture(np.uint16, white_level=4095)).image
    assert answer.pixels.max() <= 4095 and answer.white_level == 4095
    assert len(np.unique(answer.pixels)) > 256


def test_the_same_image_gives_the_same_bytes_alone_and_in_a_batch(tiny_config: ExperimentConfig) -> None:
    worker = restorer(tiny_config)
    images = [picture(np.uint8), picture(np.uint16), picture(np.uint8, (61, 45, 3)), picture(np.uint8)]
    together = worker.restore_batch(images, [None] * 4)
    for image, answer in zip(images, together, strict=True):
        assert isinstance(answer, Restoration)
        assert encode(answer.image) == encode(worker.restore(decode(encode(image))).image)


def test_a_bad_mask_spoils_no_other_image_of_the_batch(tiny_config: ExperimentConfig) -> None:
    image = picture(np.uint8)
    bad, good = restorer(tiny_config).restore_batch([image, image], [np.zeros((3, 3), bool), None])
    assert isinstance(bad, ImageError) and bad.code == "mismatch"
    assert isinstance(good, Restoration)


def test_a_model_that_needs_the_mask_says_so(tiny_config: ExperimentConfig) -> None:
    config = with_values(tiny_config, {"model.mask": "given", "data.mask_dropout": 0.0})
    image = picture(np.uint8)
    with pytest.raises(ImageError, match="mask") as error:
        restorer(config).restore(image)
    assert error.value.code == "mask_required"
    assert restorer(config).restore(image, np.zeros(image.size, bool)).image.size == image.size


def test_a_known_mask_reaches_the_model(tiny_config: ExperimentConfig) -> None:
    image, worker = picture(np.uint16), restorer(tiny_config)
    mask = np.zeros(image.size, bool)
    mask[20:30, 20:30] = True
    assert not np.array_equal(worker.restore(image, mask).image.pixels, worker.restore(image).image.pixels)


MODELS = {
    "the recipe's, which pools over its whole input": {},
    "pooling in cells": {"model.attention_window": 32},
    "group norm": {"model.norm": "group", "model.attention": "none"},
    "folded pixels and strided layers": {
        "model.stem": 2,
        "model.block": "naf",
        "model.downsample": "conv",
        "model.upsample": "shuffle",
        "model.attention_window": 32,
    },
}


def scene(shape: tuple[int, int] = (150, 230)) -> Image:
    """16-bit waves and noise, with parts so dark and so bright that local statistics differ from the image's."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    values = 0.5 + 0.3 * np.sin(x / 9) * np.cos(y / 14) + np.random.default_rng(0).normal(0, 0.05, shape)
    values[:, :50], values[70:120, 130:200] = 0, 1
    return Image(np.rint(np.clip(values, 0, 1) * 65535).astype(np.uint16), "tiff", 65535)


@pytest.mark.parametrize(
    ("kind", "ensemble"), [*((kind, "none") for kind in MODELS), ("folded pixels and strided layers", "flips")]
)
def test_the_result_does_not_depend_on_the_tile(tiny_config: ExperimentConfig, kind: str, ensemble: Ensemble) -> None:
    config, image = with_values(tiny_config, MODELS[kind]), scene()
    whole, *tiled = (
        restorer(config, RestoreSettings(tile=tile, ensemble=ensemble, window=128)).restore(image).image.pixels
        for tile in (512, 128, 64)
    )
    assert np.abs(whole.astype(int) - image.pixels).mean() > 5 * 257
    for pixels in tiled:
        assert np.abs(pixels.astype(int) - whole).max() <= 257  # one level of 255


def test_without_a_halo_tiles_would_show(tiny_config: ExperimentConfig) -> None:
    image = scene()
    whole, tiled = (
        restorer(tiny_config, RestoreSettings(tile=tile, halo=1, window=128)).restore(image).image.pixels
        for tile in (512, 64)
    )
    assert np.abs(tiled.astype(int) - whole).max() > 257


def test_a_small_image_is_what_the_model_alone_makes_of_it(tiny_config: ExperimentConfig) -> None:
    worker, image = restorer(tiny_config), picture(np.uint16)
    with torch.inference_mode():
        expected = worker.model(torch.from_numpy(image.to_unit())[None, None]).image[0, 0].numpy()
    assert np.abs(worker.restore(image).image.pixels.astype(int) - image.with_unit(expected).pixels).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (1, 300), (3, 5)])
@pytest.mark.parametrize("kind", MODELS)
def test_images_smaller_than_the_stride_are_restored(
    tiny_config: ExperimentConfig, kind: str, shape: tuple[int, int]
) -> None:
    image = picture(np.uint8, shape)
    worker = restorer(with_values(tiny_config, MODELS[kind]), RestoreSettings(tile=64, ensemble="dihedral"))
    assert worker.restore(image).image.size == shape


def test_an_ensemble_turns_with_the_image(tiny_config: ExperimentConfig) -> None:
    image = picture(np.uint16, (40, 40))
    worker = restorer(tiny_config, RestoreSettings(ensemble="dihedral"))
    turned = replace(image, pixels=np.ascontiguousarray(image.pixels[::-1].T))
    answer, expected = worker.restore(turned).image.pixels, worker.restore(image).image.pixels[::-1].T
    assert np.abs(answer.astype(int) - expected).max() <= 1
    plain = restorer(tiny_config)
    difference = plain.restore(turned).image.pixels - plain.restore(image).image.pixels[::-1].T.astype(int)
    assert np.abs(difference).max() > 100


@pytest.mark.parametrize("tile", [32, 512])
def test_strips_give_the_pixels_and_the_report_of_the_whole_image(tiny_config: ExperimentConfig, tile: int) -> None:
    image, worker = scene(), restorer(tiny_config, RestoreSettings(tile=tile, window=64))
    mask = np.zeros(image.size, bool)
    mask[20:40, 100:200] = True
    bands: list[Image] = []
    told: list[tuple[int, int]] = []
    report = worker.restore_strips(
        image, bands.extend, WholeMask(mask), progress=lambda done, total: told.append((done, total))
    )
    whole = worker.restore(image, mask)
    np.testing.assert_array_equal(np.concatenate([band.pixels for band in bands]), whole.image.pixels)
    assert report == whole.report
    assert told[-1] == (150, 150) and len(told) == len(bands) == (5 if tile == 32 else 1)


def test_a_model_of_five_channels_takes_images_of_five_and_names_what_else_it_is_given(
    tiny_config: ExperimentConfig,
) -> None:
    worker = restorer(with_values(tiny_config, {"model.channels": 5}))
    image = picture(np.uint8, (20, 30, 5))
    answer = worker.restore(image).image
    assert answer.pixels.shape == (20, 30, 5) and not np.array_equal(answer.pixels, image.pixels)
    with pytest.raises(ImageError, match="3 channels and the model 5") as error:
        worker.restore(picture(np.uint8, (20, 30, 3)))
    assert error.value.code == "mismatch"


def test_a_colour_image_passes_a_grey_model_plane_by_plane(tiny_config: ExperimentConfig) -> None:
    worker, image = restorer(tiny_config), picture(np.uint16, (20, 30, 3))
    planes = [worker.restore(Image(image.pixels[..., c].copy(), "png", 65535)).image.pixels for c in range(3)]
    assert np.abs(worker.restore(image).image.pixels.astype(int) - np.stack(planes, 2)).max() <= 1


BAD = {
    "a value above the white level": (Image(np.full((4, 4), 65535, np.uint16), "png", 4095), "65535"),
    "floats": (Image(np.full((4, 4), np.nan, np.float32)), "float32"),  # type: ignore[arg-type]
    "signed samples": (Image(np.zeros((4, 4), np.int16)), "int16"),  # type: ignore[arg-type]
    "no pixels": (Image(np.zeros((0, 4), np.uint8)), "shape"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pixels_are_named_and_spoil_no_other_image(tiny_config: ExperimentConfig, kind: str) -> None:
    image, word = BAD[kind]
    bad, good = restorer(tiny_config).restore_batch([image, picture(np.uint8)], [None, None])
    assert isinstance(bad, ImageError) and word in str(bad)
    assert isinstance(good, Restoration)


def test_predicted_maps_come_with_the_image_and_do_not_depend_on_the_tile(tiny_config: ExperimentConfig) -> None:
    values = {
        "model.mask": "predicted",
        "model.error": True,
        "loss.mask": 0.1,
        "loss.error": 0.1,
        "data.mask_dropout": 0.0,
    }
    config, pixels = with_values(tiny_config, values), scene().pixels
    image = Image(np.stack([pixels, pixels // 2, pixels // 3], 2), "png", 65535)
    whole, tiled = (restorer(config, RestoreSettings(tile=tile)).restore(image) for tile in (512, 64))
    for left, right in ((whole.defect_map, tiled.defect_map), (whole.error_bound, tiled.error_bound)):
        assert left is not None and right is not None
        assert left.shape == image.size and left.dtype == np.float32
        np.testing.assert_allclose(left, right, atol=1 / 255)
    assert whole.defect_map is not None and 0 <= whole.defect_map.min() < whole.defect_map.max() <= 1
    planes = [restorer(config).restore(Image(image.pixels[..., c].copy(), "png", 65535)) for c in range(3)]
    bounds = [plane.error_bound for plane in planes if plane.error_bound is not None]
    np.testing.assert_allclose(whole.error_bound, np.max(bounds, 0), atol=1e-5)


def test_a_model_without_maps_gives_none(tiny_config: ExperimentConfig) -> None:
    answer = restorer(tiny_config).restore(picture(np.uint8))
    assert answer.defect_map is None and answer.error_bound is None


def test_an_image_unlike_those_it_was_trained_on_comes_back_untouched_and_says_so(
    tiny_config: ExperimentConfig,
) -> None:
    dice = np.random.default_rng(0)
    known = [np.clip(scene((60, 80)).to_unit() + dice.normal(0, 0.02, (60, 80)), 0, 1) for _ in range(20)]
    profile = fit_profile([image.astype(np.float32) for image in known])
    worker = restorer(tiny_config)
    worker.calibration = Calibration(profile=profile)
    strange = picture(np.uint8, (60, 80))
    answer = worker.restore(strange)
    assert answer.report.abstained and not answer.report.alarm
    assert np.array_equal(answer.image.pixels, strange.pixels) and answer.defect_map is None
    bands: list[Image] = []
    assert worker.restore_strips(strange, bands.extend).abstained == answer.report.abstained
    assert np.array_equal(np.concatenate([band.pixels for band in bands]), strange.pixels)
    worker.settings = RestoreSettings(abstain=False)
    assert worker.restore(strange).report.abstained is None


@pytest.mark.parametrize("values", [{"tile": 0}, {"halo": -1}, {"window": 0}, {"ensemble": "some"}])
def test_settings_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        RestoreSettings(**values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_become_an_image(tiny_config: ExperimentConfig, value: float) -> None:
    worker = restorer(tiny_config)
    worker.model.background_head.bias.data.fill_(value)
    with pytest.raises(KintsugiError, match="not finite"):
        worker.restore(picture(np.uint8))


def test_an_erased_structure_lowers_the_retention_and_raises_the_alarm(tiny_config: ExperimentConfig) -> None:
    worker = restorer(with_values(tiny_config, {"model.residual": False}))
    y, x = np.mgrid[:160, :160]
    values = np.random.default_rng(0).normal(0.6, 0.02, (160, 160))
    for row, column in ((30, 40), (110, 60), (70, 120)):
        values[np.hypot(y - row, x - column) < 9] -= 0.4
    for head in (worker.model.background_head, worker.model.defect_head):
        head.weight.data.zero_()
        head.bias.data.fill_(0.5)
    report = worker.restore(Image(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))).report
    assert report.retention < 0.1 and report.alarm and report.reasons


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_strips_stop_at_values_that_are_not_finite(tiny_config: ExperimentConfig, value: float) -> None:
    worker = restorer(tiny_config)
    worker.model.background_head.bias.data.fill_(value)
    with pytest.raises(KintsugiError, match="not finite"):
        worker.restore_strips(picture(np.uint8), lambda bands: [None for _ in bands].clear())


def test_a_checkpoint_folder_makes_a_restorer(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    worker, image = restorer(tiny_config), picture(np.uint8)
    save_checkpoint(tmp_path, worker.model, tiny_config, {"score": 0.0}, {})
    again = Restorer.from_checkpoint(tmp_path)
    assert np.array_equal(again.restore(image).image.pixels, worker.restore(image).image.pixels)


def test_a_calibration_beside_the_weights_is_used_and_a_changed_one_refused(
    tmp_path: Path, tiny_config: ExperimentConfig
) -> None:
    save_checkpoint(tmp_path, restorer(tiny_config).model, tiny_config, {"score": 0.0}, {})
    assert Restorer.from_checkpoint(tmp_path).calibration == Calibration()
    known = Calibration(limits=TrustLimits(min_retention=0.9), error_scale=1.5)
    save_calibration(tmp_path, known)
    assert Restorer.from_checkpoint(tmp_path).calibration == known
    (tmp_path / CALIBRATION).write_text("{}")
    with pytest.raises(IntegrityError):
        Restorer.from_checkpoint(tmp_path)


def test_a_calibration_that_no_manifest_knows_is_refused(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    save_checkpoint(tmp_path, restorer(tiny_config).model, tiny_config, {"score": 0.0}, {})
    (tmp_path / CALIBRATION).write_text("{}")
    with pytest.raises(IntegrityError, match="manifest"):
        Restorer.from_checkpoint(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_a_gpu_answers_as_a_cpu_does() -> None:
    image = picture(np.uint16, (300, 260))
    settings = RestoreSettings(abstain=False)
    here, there = (Restorer.from_checkpoint(device=name, settings=settings).restore(image) for name in ("cpu", "cuda"))
    assert np.abs(here.image.pixels.astype(int) - there.image.pixels).max() <= 1e-4 * 65535


def test_work_that_nobody_waits_for_ends_before_its_next_tile(tiny_config: ExperimentConfig) -> None:
    image = picture(np.uint8, (400, 40))
    worker = restorer(tiny_config, RestoreSettings(tile=32))
    runs = [0]

    def count(*_: object) -> None:
        runs[0] += 1

    worker.model.register_forward_hook(count)
    with pytest.raises(Abandoned):
        worker.restore_batch([image], [None], stop=lambda: runs[0] == 3)
    assert runs == [3]
    with pytest.raises(Abandoned):
        worker.restore_strips(image, list, stop=lambda: runs[0] == 5)
    assert runs == [5]
