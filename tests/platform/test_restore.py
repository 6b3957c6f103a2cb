from pathlib import Path

import numpy as np
import pytest
import torch

from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import ExperimentConfig, with_values
from kintsugi.errors import ImageError, KintsugiError
from kintsugi.imaging import Image, decode, encode
from kintsugi.models import build_model
from kintsugi.restore import Restoration, Restorer, RestoreSettings


def restorer(config: ExperimentConfig, settings: RestoreSettings | None = None) -> Restorer:
    """A model whose last layers are not zero, so that it changes its input."""
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    for head in (model.background_head, model.defect_head):
        torch.nn.init.normal_(head.weight, std=0.02)
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


def test_tiles_of_an_untrained_residual_model_leave_no_seam(tiny_config: ExperimentConfig) -> None:
    torch.manual_seed(0)
    identity = Restorer(build_model(tiny_config.model).eval(), settings=RestoreSettings(tile=32, overlap=8))
    image = picture(np.uint16, (100, 75))
    assert np.array_equal(identity.restore(image).image.pixels, image.pixels)


def test_an_image_above_the_tile_size_is_restored_by_tiles(tiny_config: ExperimentConfig) -> None:
    image = picture(np.uint8, (150, 90))
    tiled = restorer(tiny_config, RestoreSettings(tile=64, overlap=16)).restore(image).image
    assert tiled.size == image.size and not np.array_equal(tiled.pixels, image.pixels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_become_an_image(tiny_config: ExperimentConfig, value: float) -> None:
    worker = restorer(tiny_config)
    worker.model.background_head.bias.data.fill_(value)
    with pytest.raises(KintsugiError, match="not finite"):
        worker.restore(picture(np.uint8))


def test_an_erased_structure_lowers_the_retention_and_raises_the_alarm(tiny_config: ExperimentConfig) -> None:
    worker = restorer(with_values(tiny_config, {"model.residual": False}))
    y, x = np.mgrid[:96, :96]
    stripes = (128 + 80 * np.sin(x / 6) * np.cos(y / 6)).astype(np.uint8)
    for head in (worker.model.background_head, worker.model.defect_head):
        head.weight.data.zero_()
        head.bias.data.fill_(0.5)
    report = worker.restore(Image(stripes)).report
    assert report.retention < 0.1 and report.alarm


def test_a_checkpoint_folder_makes_a_restorer(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    worker, image = restorer(tiny_config), picture(np.uint8)
    save_checkpoint(tmp_path, worker.model, tiny_config, {"score": 0.0}, {})
    again = Restorer.from_checkpoint(tmp_path)
    assert np.array_equal(again.restore(image).image.pixels, worker.restore(image).image.pixels)
