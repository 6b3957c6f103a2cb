import numpy as np
import pytest

from kintsugi.data.degradation import generator_for
from kintsugi.data.planted import plant_line, plant_random, plant_spot


@pytest.mark.parametrize("diameter", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("contrast", [-0.3, 0.2])
def test_a_spot_has_the_area_and_the_contrast_that_were_asked_for(diameter: float, contrast: float) -> None:
    flat = np.full((64, 64), 0.5, np.float32)
    spots = [plant_spot(flat, generator_for(i), diameter=diameter, contrast=contrast) for i in range(20)]
    added = np.mean([float((image - flat).sum()) for image, _ in spots])
    assert added == pytest.approx(contrast * np.pi / 4 * diameter**2, rel=0.45 if diameter < 3 else 0.2)
    for image, mask in spots:
        assert mask.any() and (np.sign((image - flat)[mask]) == np.sign(contrast)).all()
        assert np.abs(image - flat).max() <= abs(contrast) + 1e-6


def test_a_line_is_as_long_as_asked_for_and_thin() -> None:
    flat = np.full((128, 128), 0.5, np.float32)
    for seed in range(10):
        image, mask = plant_line(flat, generator_for(seed), width=2, length=40, contrast=0.3)
        assert mask.any() and mask.sum() < 40 * 4
        assert image.max() <= 0.8 + 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (7, 3), (30, 30, 3)])
def test_any_image_takes_a_defect_and_stays_in_range(shape: tuple[int, ...]) -> None:
    image = np.full(shape, 0.9, np.float32)
    for seed in range(20):
        planted, mask = plant_random(image, generator_for(seed))
        assert planted.shape == shape and planted.dtype == np.float32 and mask.shape == shape[:2]
        assert planted.min() >= 0 and planted.max() <= 1
        assert mask.any()
