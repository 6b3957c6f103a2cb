import math

import numpy as np
import pytest

from kintsugi.detection.detectability import Detectability, average_precision, measure_detectability
from kintsugi.errors import DataError


def _map(values: list[float]) -> np.ndarray:
    return np.array([values], np.float32)


def _mask(values: list[int]) -> np.ndarray:
    return np.array([values], bool)


def test_a_perfect_ranking_has_average_precision_1() -> None:
    assert average_precision([_map([0.1, 0.9]), _map([0.2, 0.8])], [_mask([0, 1]), _mask([0, 1])]) == 1


def test_average_precision_of_the_textbook_example() -> None:
    # scikit-learn's own example: labels 0 0 1 1, scores .1 .4 .35 .8.
    assert average_precision([_map([0.1, 0.4, 0.35, 0.8])], [_mask([0, 0, 1, 1])]) == pytest.approx(5 / 6)


def test_equal_scores_count_as_one_step_wherever_they_stand() -> None:
    # At .5: 1 defect of 3 px; at .2 all 2 of 4. 1/2 * 1/3 + 1/2 * 2/4.
    scores, mask = [0.5, 0.5, 0.5, 0.2], [0, 1, 0, 1]
    forward = average_precision([_map(scores)], [_mask(mask)])
    assert forward == pytest.approx(1 / 6 + 1 / 4)
    assert average_precision([_map(scores[::-1])], [_mask(mask[::-1])]) == forward


def test_a_constant_map_scores_the_share_of_defect_pixels() -> None:
    assert average_precision([_map([0.3] * 8)], [_mask([1, 1, 0, 0, 0, 0, 0, 0])]) == pytest.approx(0.25)


def test_average_precision_agrees_with_its_definition_on_random_maps() -> None:
    generator = np.random.default_rng(0)
    scores = [np.round(generator.random((9, 7)), 1).astype(np.float32) for _ in range(4)]
    masks = [generator.random((9, 7)) < 0.3 for _ in range(4)]
    flat, truth = np.concatenate([s.ravel() for s in scores]), np.concatenate([m.ravel() for m in masks])
    expected, recall = 0.0, 0.0
    for level in sorted(set(flat.tolist()), reverse=True):
        chosen = flat >= level
        now = truth[chosen].sum() / truth.sum()
        expected += (now - recall) * truth[chosen].mean()
        recall = now
    assert average_precision(scores, masks) == pytest.approx(expected)


def test_average_precision_without_a_defect_is_not_a_number() -> None:
    assert math.isnan(average_precision([_map([0.1, 0.2])], [_mask([0, 0])]))


SIDE = 48


def _defective(strength: float, extra: float = 0.0) -> np.ndarray:
    """A map of faint noise with two marks: one of 16 px, one of 1 px; `extra` is a region of 9 px in the background."""
    scores = np.random.default_rng(1).uniform(0, 0.05, (SIDE, SIDE)).astype(np.float32)
    scores[4:8, 4:8] = strength
    scores[40, 40] = strength
    scores[24:27, 24:27] = np.maximum(scores[24:27, 24:27], extra)
    return scores


def _truth() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[4:8, 4:8] = True
    mask[40, 40] = True
    return mask


def _free(extra: float = 0.0) -> np.ndarray:
    scores = np.random.default_rng(2).uniform(0, 0.05, (SIDE, SIDE)).astype(np.float32)
    scores[24:27, 24:27] = np.maximum(scores[24:27, 24:27], extra)
    return scores


def _measure(restored: list[np.ndarray], degraded: list[np.ndarray] | None = None) -> Detectability:
    clean = [_defective(0.9), _free(), _free()]
    masks = [_truth(), np.zeros((SIDE, SIDE), bool), np.zeros((SIDE, SIDE), bool)]
    return measure_detectability(
        clean, degraded or [_defective(0), _free(), _free()], restored, masks, [False, True, True],
        groups=["a", "b", "b"],
    )  # fmt: skip


def test_a_perfect_restoration_recovers_everything_and_invents_nothing() -> None:
    found = _measure([_defective(0.9), _free(), _free()])
    assert found.recovered == pytest.approx(1)
    assert found.recovered_bounds is not None and found.recovered_bounds.low == pytest.approx(1, abs=0.01)
    assert (found.degraded_recall, found.restored_recall, found.clean_recall) == (0, 1, 1)
    assert found.restored_rise == 0
    assert (found.images, found.defects, found.defect_free_images) == (3, 2, 2)


def test_doing_nothing_recovers_nothing() -> None:
    assert _measure([_defective(0), _free(), _free()]).recovered == pytest.approx(0)


def test_each_image_counts_once_in_the_mean_over_images() -> None:
    large, small = np.zeros((SIDE, SIDE), bool), np.zeros((SIDE, SIDE), bool)
    large[:24], small[0, 0] = True, True
    clean = [large.astype(np.float32), small.astype(np.float32)]
    lost = [large.astype(np.float32), np.zeros((SIDE, SIDE), np.float32)]
    found = measure_detectability(clean, lost, clean, [large, small], [False, False])
    assert found.degraded_ap == pytest.approx(1, abs=0.01)
    assert found.degraded_image_ap == pytest.approx(0.5, abs=0.01)
    assert (found.clean_image_ap, found.image_recovered) == (1, 1)


def test_half_of_the_defects_found_is_a_recall_of_a_half() -> None:
    half = _defective(0.9)
    half[40, 40] = 0
    assert _measure([half, _free(), _free()]).restored_recall == 0.5


def test_one_new_false_alarm_in_one_of_two_good_images_is_a_rise_of_a_half() -> None:
    found = _measure([_defective(0.9), _free(extra=0.9), _free()])
    assert found.restored_rise == 0.5
    assert found.degraded_rise == 0


def test_a_false_alarm_of_few_pixels_or_on_a_defective_image_is_no_rise() -> None:
    speck = _free()
    speck[30, 30:33] = 0.9
    assert _measure([_defective(0.9, extra=0.9), speck, _free()]).restored_rise == 0


def test_recovered_is_absent_where_degrading_cost_nothing() -> None:
    whole = [_defective(0.9), _free(), _free()]
    found = _measure(whole, degraded=whole)
    assert found.recovered is None
    assert found.recovered_bounds is None


def test_the_threshold_leaves_the_stated_share_of_clean_background_above_it() -> None:
    generator = np.random.default_rng(3)
    maps = [generator.random((100, 100)).astype(np.float32) for _ in range(3)]
    masks = [np.zeros((100, 100), bool)] * 3
    found = measure_detectability(maps, maps, maps, masks, [True] * 3, false_alarm_share=0.01)
    above = sum(int((scores > found.threshold).sum()) for scores in maps)
    assert above == 300


def test_the_surroundings_of_a_defect_are_no_background() -> None:
    blurred = _defective(0.9)
    blurred[2:10, 2:10] = 0.9
    masks = [_truth()]
    found = measure_detectability([blurred], [blurred], [blurred], masks, [False])
    assert found.threshold < 0.1


def test_images_that_nobody_looked_at_are_left_out() -> None:
    clean, lost = [_defective(0.9), _free(0.9)], [_defective(0), _free(0.9)]
    found = measure_detectability(clean, lost, clean, [_truth(), None], [False, False])
    assert (found.images, found.defect_free_images, found.restored_rise) == (1, 0, None)
    with pytest.raises(DataError, match="labelled"):
        measure_detectability(clean, lost, clean, [None, None], [False, False])


def test_without_a_defect_only_false_alarms_are_told() -> None:
    empty = np.zeros((SIDE, SIDE), bool)
    found = measure_detectability([_free()], [_free()], [_free(0.9)], [empty], [True], groups=["a"])
    assert (found.clean_ap, found.recovered, found.clean_recall) == (None, None, None)
    assert found.restored_rise == 1
    assert Detectability.model_validate_json(found.model_dump_json()) == found
