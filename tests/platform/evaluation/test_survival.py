from io import BytesIO

import numpy as np
import pytest
from PIL import Image as PillowImage
from scipy import ndimage

from kintsugi.data.degradation import PRESETS, Camera, Exposure, GaussianNoise
from kintsugi.evaluation.survival import SurvivalCurve, draw_survival, measure_survival
from kintsugi.imaging import Image

NOTHING = Camera()
SIZES, CONTRASTS = (1.0, 3.0, 8.0), (-0.16, 0.32)


def _surfaces(count: int = 3, shape: tuple[int, ...] = (120, 150)) -> list[tuple[str, Image]]:
    """Texture on slow shading, 8 bit."""
    generator = np.random.default_rng(0)
    made: list[tuple[str, Image]] = []
    for index in range(count):
        texture = ndimage.gaussian_filter(generator.standard_normal(shape), 1)
        shading = np.linspace(0.35, 0.6, shape[1]).reshape((1, -1) + (1,) * (len(shape) - 2))
        made.append((f"tile-{index}", Image(np.rint(np.clip(shading + 0.05 * texture, 0, 1) * 255).astype(np.uint8))))
    return made


def _same(image: Image) -> Image:
    return image


def _median(image: Image) -> Image:
    return image.with_unit(ndimage.median_filter(image.to_unit(), 9))


def _measure(degradation: Camera = NOTHING, restore=_same, **options) -> SurvivalCurve:
    return measure_survival(_surfaces(), degradation, restore, sizes=SIZES, contrasts=CONTRASTS, **options)


def test_what_is_left_alone_survives_whole() -> None:
    curve = _measure()
    assert len(curve.cells) == 6
    assert all(cell.kept == pytest.approx(1, abs=0.03) for cell in curve.cells)
    assert all(cell.survived == 1 and cell.degraded_survived == 1 for cell in curve.cells)
    assert all(cell.count == curve.images == 3 for cell in curve.cells)


def test_a_median_filter_erases_small_spots_and_keeps_none_of_their_contrast() -> None:
    curve = _measure(restore=_median)
    for diameter in (1.0, 3.0):
        for contrast in CONTRASTS:
            assert abs(curve.cell(diameter, contrast).kept) < 0.15
            assert curve.cell(diameter, contrast).survived == 0
    assert curve.cell(8.0, 0.32).kept > curve.cell(3.0, 0.32).kept
    assert curve.cell(1.0, 0.32).degraded_kept == pytest.approx(1, abs=0.03)


def test_noise_cancels_against_the_same_noise_without_spots() -> None:
    curve = _measure(Camera(GaussianNoise((0.1, 0.1))))
    assert curve.cell(8.0, -0.16).kept == pytest.approx(1, abs=0.05)


def test_a_change_of_exposure_is_no_loss_of_contrast() -> None:
    curve = _measure(Camera(Exposure((0.5, 0.5), (0.1, 0.1))))
    assert all(cell.kept == pytest.approx(1, abs=0.06) for cell in curve.cells)


def test_blur_takes_more_from_small_spots() -> None:
    curve = measure_survival(_surfaces(), PRESETS["kla"], _same, sizes=SIZES, contrasts=CONTRASTS)
    kept = [curve.cell(diameter, 0.32).degraded_kept for diameter in SIZES]
    assert kept[0] < 0.4 < kept[2]
    assert kept == sorted(kept)


def test_what_saturates_is_not_counted_as_lost() -> None:
    white = [("white", Image(np.full((120, 150), 250, np.uint8)))]
    curve = measure_survival(white, NOTHING, _same, sizes=(3.0,), contrasts=(-0.16, 0.32))
    assert [cell.contrast for cell in curve.cells] == [-0.16]


def test_colour_and_depth_are_kept_apart_from_contrast() -> None:
    deep = [(name, Image(i.pixels.astype(np.uint16) * 16, white_level=4080)) for name, i in _surfaces()]
    for images in (deep, _surfaces(shape=(120, 150, 3))):
        curve = measure_survival(images, NOTHING, _same, sizes=SIZES, contrasts=CONTRASTS)
        assert all(cell.kept == pytest.approx(1, abs=0.03) for cell in curve.cells)


def test_the_same_seed_plants_the_same_spots() -> None:
    noise = Camera(GaussianNoise((0.05, 0.05)))
    assert _measure(noise, _median) == _measure(noise, _median)
    assert _measure(noise, _median, seed=1) != _measure(noise, _median)


def test_an_image_without_room_carries_no_spot() -> None:
    curve = measure_survival([("tiny", Image(np.zeros((9, 300), np.uint8)))], NOTHING, _same)
    assert curve.cells == ()
    assert curve.images == 1


def test_a_curve_comes_back_from_json_and_is_drawn() -> None:
    curve = _measure(restore=_median)
    assert SurvivalCurve.model_validate_json(curve.model_dump_json()) == curve
    drawn = draw_survival({"median": curve, "untouched": _measure()})
    with PillowImage.open(BytesIO(drawn)) as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 5
    assert drawn == draw_survival({"median": curve, "untouched": _measure()})
