import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from kintsugi.errors import DataError, ImageError
from kintsugi.trust.judge import (
    InputProfile,
    Trust,
    TrustLimits,
    abstain_reason,
    calibrate,
    confidence_map,
    conformal_scale,
    fit_profile,
    judge,
)

Unit = NDArray[np.float32]
SPOT = (slice(60, 82), slice(90, 112))


def surface(seed: int = 0, shape: tuple[int, int] = (160, 192)) -> Unit:
    """Uneven light, wide texture and fine grain."""
    generator = np.random.default_rng(seed)
    wide, fine = (generator.standard_normal(shape, np.float32) for _ in range(2))
    texture = 0.4 * cv2.GaussianBlur(wide, (0, 0), 6) + 0.01 * cv2.GaussianBlur(fine, (0, 0), 0.8)
    return np.clip(0.5 + np.linspace(-0.1, 0.1, shape[1], dtype=np.float32) + texture, 0, 1)


def with_spot(image: Unit, contrast: float = -0.15) -> Unit:
    marked = image.copy()
    marked[SPOT] += np.float32(contrast)
    return marked


def noisy(image: Unit, sigma: float = 0.05, seed: int = 9) -> Unit:
    noise = np.random.default_rng(seed).standard_normal(image.shape, np.float32)
    return np.clip(image + np.float32(sigma) * noise, 0, 1)


def photographed(image: Unit) -> Unit:
    """Motion, flat contrast and noise."""
    return noisy(0.8 * cv2.blur(image, (11, 1)) + np.float32(0.08))


def near_spot(trust: Trust) -> bool:
    row, column = np.unravel_index(int(trust.suspicion.argmax()), trust.suspicion.shape)
    return 52 <= row < 90 and 82 <= column < 120


def test_a_perfect_restoration_of_a_blurred_noisy_darkened_input_raises_no_alarm() -> None:
    clean = with_spot(surface())
    trust = judge(photographed(clean), clean)
    assert not trust.alarm and trust.reasons == ()
    assert trust.retention > 0.9 and trust.local_retention > 0.5
    assert trust.added == trust.removed == 0


def test_an_erased_defect_raises_the_alarm_where_it_was() -> None:
    clean = surface()
    trust = judge(photographed(with_spot(clean)), clean)
    assert trust.alarm and near_spot(trust)
    assert trust.reasons[0].startswith("structure removed near row ")
    assert trust.removed > trust.added
    assert trust.local_retention < 0.3


def test_an_invented_defect_raises_the_alarm_where_it_is() -> None:
    clean = surface()
    trust = judge(photographed(clean), with_spot(clean))
    assert trust.alarm and near_spot(trust)
    assert trust.reasons[0].startswith("structure added near row ")
    assert trust.added > trust.removed


def test_local_retention_sees_an_erased_defect_better_than_the_whole_image_does() -> None:
    degraded, erased, kept = noisy(with_spot(surface())), surface(), with_spot(surface())
    fall = {name: getattr(judge(degraded, kept), name) - getattr(judge(degraded, erased), name) for name in
            ("retention", "local_retention")}  # fmt: skip
    assert fall["local_retention"] > fall["retention"] > 0.01


def test_retention_falls_where_everything_is_smoothed_away() -> None:
    degraded = noisy(surface(), 0.01)
    assert judge(degraded, np.full_like(degraded, 0.5)).retention < 0.05
    assert judge(degraded, degraded).retention == pytest.approx(1, abs=0.02)


def test_noise_alone_counts_as_no_structure() -> None:
    flat = np.full((128, 128), 0.5, np.float32)
    trust = judge(noisy(flat), flat)
    assert not trust.alarm and trust.retention == 1


def test_grain_that_spans_pixels_raises_no_alarm() -> None:
    clean = surface()
    grain = cv2.GaussianBlur(np.random.default_rng(4).standard_normal(clean.shape, np.float32), (0, 0), 1.0)
    degraded = np.clip(clean + 0.05 * grain / grain.std(), 0, 1)
    assert not judge(degraded, clean).alarm


def test_an_output_equal_to_its_input_scores_nothing() -> None:
    trust = judge(surface(), surface())
    assert trust.alarm_score < 0.1 and not trust.alarm


def test_a_defect_in_one_colour_channel_is_seen() -> None:
    clean = np.stack([surface(seed) for seed in range(3)], axis=2)
    erased = noisy(np.stack([with_spot(clean[..., 0]), clean[..., 1], clean[..., 2]], axis=2))
    trust = judge(erased, clean)
    assert trust.alarm and near_spot(trust)
    assert trust.suspicion.shape == clean.shape[:2]


def test_the_place_in_words_is_the_place_on_the_map() -> None:
    trust = judge(noisy(with_spot(surface())), surface())
    row, column = np.unravel_index(int(trust.suspicion.argmax()), trust.suspicion.shape)
    assert trust.reasons[0].endswith(f"near row {row}, column {column}")


def test_limits_decide_on_the_alarm() -> None:
    degraded, erased = noisy(with_spot(surface())), surface()
    trust = judge(degraded, erased)
    assert not judge(degraded, erased, limits=TrustLimits(max_alarm_score=trust.alarm_score)).alarm
    strict = TrustLimits(max_alarm_score=math.inf, min_retention=1.1, min_local_retention=1.1)
    assert [reason.split()[0] for reason in judge(degraded, erased, limits=strict).reasons] == ["only", "in"]


def test_a_model_that_is_unsure_raises_an_alarm_and_silences_none() -> None:
    degraded, erased = noisy(with_spot(surface())), surface()
    unsure = np.full(degraded.shape, 0.5, np.float32)
    assert judge(degraded, erased, error_bound=unsure).alarm
    limits = TrustLimits(max_expected_error=0.3)
    good = judge(noisy(erased), erased, error_bound=unsure, limits=limits)
    assert good.alarm and "50%" in good.reasons[0]
    assert not judge(noisy(erased), erased, error_bound=unsure / 10, limits=limits).alarm


def test_limits_and_profiles_survive_json() -> None:
    limits = TrustLimits(max_alarm_score=7.5, min_retention=0.25)
    assert TrustLimits.model_validate_json(limits.model_dump_json()) == limits
    assert TrustLimits.model_validate_json(TrustLimits().model_dump_json()) == TrustLimits()
    profile = fit_profile([noisy(surface(s)) for s in range(4)], [surface(s) for s in range(4)])
    assert InputProfile.model_validate_json(profile.model_dump_json()) == profile


def test_a_report_without_its_map_is_plain_data() -> None:
    told = judge(surface(), surface()).to_dict()
    assert "suspicion" not in told and told["alarm"] is False


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (9, 70), (1, 1, 3), (17, 5, 3)])
def test_images_of_any_size_are_judged(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).random(shape, np.float32)
    trust = judge(image, image)
    assert math.isfinite(trust.alarm_score) and not trust.alarm
    assert trust.suspicion.shape == shape[:2]
    assert confidence_map(image, image).shape == shape[:2]


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_constant_images_are_judged(level: float) -> None:
    flat = np.full((64, 64), level, np.float32)
    assert judge(flat, flat).alarm_score == pytest.approx(0, abs=1e-3)
    assert judge(flat, np.zeros_like(flat)).retention == 1
    assert judge(flat, with_spot(np.full((128, 128), level, np.float32))[30:94, 60:124]).alarm


def test_differing_sizes_are_refused() -> None:
    with pytest.raises(ImageError) as raised:
        judge(np.zeros((8, 8), np.float32), np.zeros((8, 9), np.float32))
    assert raised.value.code == "mismatch"


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    good, bad = np.zeros((8, 8), np.float32), np.full((8, 8), np.nan, np.float32)
    with pytest.raises(DataError, match="input"):
        judge(bad, good)
    with pytest.raises(DataError, match="restoration"):
        judge(good, bad)
    with pytest.raises(DataError):
        abstain_reason(np.full((32, 32), np.inf, np.float32), fit_profile([surface(0), surface(1)]))


def scored(value: float) -> Trust:
    return Trust(1, 1, 0, 0, value, 0, False, (), np.zeros((1, 1), np.float32))


def test_calibrated_limits_let_the_wanted_share_of_good_restorations_pass() -> None:
    generator = np.random.default_rng(0)
    alarms = []
    for _ in range(200):
        scores = generator.standard_normal(60)
        limits = calibrate([scored(score) for score in scores[:40]], target_false_alarm=0.1)
        alarms.append((scores[40:] > limits.max_alarm_score).mean())
    assert 0.06 < np.mean(alarms) <= 0.11


def test_a_part_photographed_often_weighs_as_much_as_any_other() -> None:
    scores = [scored(1.0)] * 90 + [scored(value) for value in (2.0, 3.0, 4.0, 5.0)]
    groups = ["often"] * 90 + list("abcd")
    assert calibrate(scores, target_false_alarm=0.3).max_alarm_score == 1
    assert calibrate(scores, groups, target_false_alarm=0.3).max_alarm_score > 3


def test_calibration_without_scores_is_refused() -> None:
    with pytest.raises(DataError):
        calibrate([])
    with pytest.raises(DataError):
        conformal_scale([], [])


def test_scaled_bounds_hold_for_the_wanted_share_of_pixels() -> None:
    generator = np.random.default_rng(0)
    bounds = [0.01 + generator.random((20, 20), np.float32) for _ in range(240)]
    errors = [b * 0.3 * np.abs(generator.standard_normal(b.shape, np.float32)) for b in bounds]
    scale = conformal_scale(bounds[:120], errors[:120], [str(i // 2) for i in range(120)], coverage=0.9)
    held = np.mean([(e <= scale * b).mean() for b, e in zip(bounds[120:], errors[120:], strict=True)])
    assert 0.9 <= held < 0.93


def test_too_few_images_to_promise_anything_give_a_factor_that_covers_all_of_them() -> None:
    bound, error = np.full((4, 4), 0.1, np.float32), np.linspace(0, 0.4, 16, dtype=np.float32).reshape(4, 4)
    assert conformal_scale([bound], [error], coverage=0.9) == pytest.approx(4)


def test_the_fallback_bound_is_larger_where_the_restoration_lost_something() -> None:
    bound = confidence_map(noisy(with_spot(surface()), 0.02), surface())
    assert bound[SPOT].mean() > 3 * bound[:40, :60].mean()


def inputs(count: int = 40) -> tuple[list[Unit], list[Unit]]:
    clean = [surface(seed) for seed in range(count)]
    degraded = [noisy(cv2.blur(c, (9, 1)) if i % 2 else c, 0.03 + 0.001 * i, i) for i, c in enumerate(clean)]
    return degraded, clean


def test_clean_inputs_are_told_from_degraded_ones_and_from_blurred_ones_without_noise() -> None:
    profile = fit_profile(*inputs())
    fresh = [surface(seed) for seed in range(100, 120)]
    told = [abstain_reason(image, profile) for image in fresh]
    assert told.count("already clean") >= 17
    for harm in (noisy, lambda image: cv2.blur(image, (9, 1)), lambda image: noisy(cv2.blur(image, (9, 1)), 0.01)):
        assert all(abstain_reason(harm(image), profile) != "already clean" for image in fresh)


def test_exposure_does_not_make_a_clean_input_dirty() -> None:
    profile = fit_profile(*inputs())
    told = [abstain_reason(surface(seed) - np.float32(0.1), profile) for seed in range(100, 120)]
    assert told.count("already clean") >= 17


def test_inputs_like_those_of_training_are_restored_and_strange_ones_are_not() -> None:
    profile = fit_profile(inputs()[0])
    known = [abstain_reason(noisy(surface(seed), 0.05, seed), profile) for seed in range(100, 120)]
    assert known.count(None) >= 17
    checks = (np.indices((160, 192)).sum(0) // 4 % 2).astype(np.float32)
    for strange in (checks, noisy(surface(), 0.4), np.zeros((160, 192), np.float32), 0.05 * surface()):
        assert abstain_reason(strange, profile) == "unfamiliar"


def test_clean_images_that_look_like_degraded_ones_never_pass_for_clean() -> None:
    images = inputs()[0]
    profile = fit_profile(images, images)
    assert sum(abstain_reason(image, profile) == "already clean" for image in images) <= 1


def test_tiny_inputs_are_never_abstained_from() -> None:
    profile = fit_profile(*inputs(8))
    assert abstain_reason(np.zeros((1, 1), np.float32), profile) is None
    assert abstain_reason(np.ones((15, 400, 3), np.float32), profile) is None


def test_a_profile_of_fewer_than_two_images_is_refused() -> None:
    with pytest.raises(DataError):
        fit_profile([surface()])
