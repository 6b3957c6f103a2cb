import subprocess
import sys

import numpy as np
import pytest

from kintsugi.data.degradation import (
    PRESETS,
    Camera,
    Choice,
    Defocus,
    Exposure,
    GaussianNoise,
    Jpeg,
    MotionBlur,
    ShotNoise,
    build_degradation,
    generator_for,
)
from kintsugi.sections import DegradationConfig

GREY = np.full((64, 64), 0.5, np.float32)


def texture(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).random(shape, np.float32)


def point() -> np.ndarray:
    image = np.zeros((33, 33), np.float32)
    image[16, 16] = 1
    return image


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("shape", [(40, 56), (40, 56, 3)])
@pytest.mark.parametrize("levels", [255, 4095, 65535])
def test_a_preset_is_seeded_keeps_shape_and_range_and_lies_on_the_levels(
    name: str, shape: tuple[int, ...], levels: int
) -> None:
    image = texture(*shape)
    before = image.copy()
    one, two, other = (PRESETS[name](image, generator_for(seed, "a"), levels) for seed in (0, 0, 1))  # pyright: ignore[reportArgumentType]
    assert np.array_equal(one, two) and np.array_equal(one, other) == (name == "clean")
    assert np.array_equal(image, before), "the clean image was changed"
    assert one.shape == shape and one.dtype == np.float32 and one.min() >= 0 and one.max() <= 1
    assert np.abs(one.astype(np.float64) * levels - np.rint(one * np.float64(levels))).max() < 0.01


def test_sixteen_bits_do_not_pass_through_eight() -> None:
    noise = Camera(GaussianNoise((0.01, 0.01)))
    fine = noise(texture(64, 64), generator_for(0), 65535)
    assert len(np.unique(np.rint(fine * 65535))) > 3000
    coarse = noise(texture(64, 64), generator_for(0), 255)
    assert len(np.unique(coarse)) <= 256


def test_steps_run_in_the_order_of_physics_whatever_the_order_they_are_given_in() -> None:
    steps = [Jpeg((30, 30)), GaussianNoise((0.05, 0.05)), Exposure((0.5, 0.5)), Defocus((2, 2))]
    image = texture(32, 32)
    forwards, backwards = (Camera(*order)(image, generator_for(0)) for order in (steps, steps[::-1]))
    assert np.array_equal(forwards, backwards)


def test_horizontal_motion_draws_a_point_into_a_horizontal_line_and_keeps_its_light() -> None:
    seen = MotionBlur((9, 9), (0, 0))(point(), generator_for(0))
    assert np.isclose(seen.sum(), 1, atol=1e-5)
    rows, columns = np.nonzero(seen > 0.02)
    assert set(rows) == {16} and columns.min() == 12 and columns.max() == 20
    assert np.allclose(seen, seen[:, ::-1], atol=1e-6)


def test_motion_turns_with_its_angle() -> None:
    upright = MotionBlur((9, 9), (np.pi / 2, np.pi / 2))(point(), generator_for(0))
    level = MotionBlur((9, 9), (0, 0))(point(), generator_for(0))
    assert np.allclose(upright, level.T, atol=1e-6)
    slanted = MotionBlur((9, 9), (np.pi / 4, np.pi / 4))(point(), generator_for(0))
    assert slanted[14, 18] > 0.05 > slanted[18, 18], "a positive angle rises to the right"


def test_defocus_draws_a_point_into_a_disc_of_its_radius() -> None:
    seen = Defocus((3, 3))(point(), generator_for(0))
    assert np.isclose(seen.sum(), 1, atol=1e-5)
    assert np.isclose(seen.max(), 1 / (np.pi * 9), rtol=0.02)
    assert seen[16, 19] > 0 and seen[16, 20] == 0


@pytest.mark.parametrize("grain", [0.0, 0.3, 0.6, 1.0])
def test_grain_correlates_the_noise_and_keeps_its_strength(grain: float) -> None:
    noise = GaussianNoise((0.1, 0.1), (grain, grain))(np.zeros((256, 256), np.float32), generator_for(1))
    assert np.isclose(noise.std(), 0.1, rtol=0.03)
    neighbours = float((noise[:, 1:] * noise[:, :-1]).mean() / noise.var())
    assert neighbours < 0.02 if grain <= 0.25 else neighbours > 0.005


def test_shot_noise_grows_with_the_root_of_the_light() -> None:
    dim, bright = (
        ShotNoise((400, 400))(np.full((128, 128), light, np.float32), generator_for(0)) for light in (0.1, 0.9)
    )
    assert np.isclose(dim.var(), 0.1 / 400, rtol=0.05) and np.isclose(bright.var(), 0.9 / 400, rtol=0.05)
    assert np.isclose(bright.mean(), 0.9, rtol=0.01)


def test_a_lower_jpeg_quality_loses_more() -> None:
    image = texture(64, 64)
    errors = [np.abs(Camera(Jpeg((q, q)))(image, generator_for(0)) - image).mean() for q in (10, 40, 95)]
    assert errors[0] > errors[1] > errors[2]


# Not those with shot noise: each Poisson draw depends on all pixels before it.
@pytest.mark.parametrize("name", ["kla", "motion", "defocus", "noise", "jpeg"])
def test_a_crop_with_the_reach_around_it_sees_what_the_whole_image_sees(name: str) -> None:
    """Changing pixels farther away than `reach` must not change the middle."""
    preset = PRESETS[name]  # pyright: ignore[reportArgumentType]
    image = texture(97, 97)
    changed = image.copy()
    inner = slice(48 - preset.reach, 48 + preset.reach + 1)
    changed[:] = 1 - changed
    changed[inner, inner] = image[inner, inner]
    one, two = (preset(i, generator_for(3), 65535)[48, 48] for i in (image, changed))
    assert one == two


def test_presets_are_chosen_by_their_share() -> None:
    config = DegradationConfig(presets={"noise": 3.0, "lowlight": 1.0, "jpeg": 0.0})
    degradation = build_degradation(config)
    dark = sum(degradation(GREY, generator_for(0, i)).mean() < 0.35 for i in range(200))
    assert 30 < dark < 70
    assert isinstance(degradation, Choice) and len(degradation.options) == 2
    assert build_degradation(DegradationConfig(presets={"kla": 0.2})) is PRESETS["kla"]


def test_the_order_in_which_presets_are_written_does_not_matter() -> None:
    one = build_degradation(DegradationConfig(presets={"noise": 1.0, "motion": 2.0}))
    two = build_degradation(DegradationConfig(presets={"motion": 2.0, "noise": 1.0}))
    for seed in range(5):
        assert np.array_equal(one(GREY, generator_for(seed)), two(GREY, generator_for(seed)))


def test_a_generator_depends_on_each_part_of_its_key_and_on_nothing_else() -> None:
    keys: list[tuple[int, *tuple[str | int, ...]]] = [
        (0, "a", "b"),
        (0, "ab"),
        (0, "a", "b", 1),
        (1, "a", "b"),
        (0, 1),
        (0, "1"),
    ]
    assert len({generator_for(*key).integers(2**62) for key in keys}) == len(keys)
    here = int(generator_for(7, 3, "tile").integers(2**62))
    code = "from kintsugi.data.degradation import generator_for; print(generator_for(7, 3, 'tile').integers(2**62))"
    there = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "99", "PYTHONPATH": ":".join(sys.path)},
    )
    assert int(there.stdout) == here


def test_the_exposed_image_has_the_exposure_and_nothing_else_of_the_degradation() -> None:
    image = texture(48, 48)
    camera = Camera(Defocus((2, 2)), Exposure((0.3, 0.4), (0.1, 0.1)), GaussianNoise((0.05, 0.05)))
    pair = camera.pair(image, generator_for(0), 255)
    assert 0.3 <= pair.gain <= 0.4
    assert np.allclose(pair.exposed, image * pair.gain + 0.1, atol=1e-6)
    assert np.array_equal(pair.degraded, camera(image, generator_for(0), 255))


def test_the_preset_clean_only_keeps_to_the_levels() -> None:
    image = texture(20, 20)
    assert np.abs(PRESETS["clean"](image, generator_for(0), 255) - image).max() <= 0.5001 / 255
