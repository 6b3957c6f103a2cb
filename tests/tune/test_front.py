from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from kintsugi.config import ExperimentConfig
from kintsugi_tune.front import chosen, dominates, hypervolume, hypervolume_after, pareto_front
from kintsugi_tune.record import SearchRecord, State, TrialRecord

START = datetime(2024, 1, 1, tzinfo=UTC)


def trial(
    number: int, point: Mapping[str, float], *, score: float = 0.0, state: State = "complete", ended: int | None = None
) -> TrialRecord:
    return TrialRecord(
        number=number, state=state, screened=False, label=None, run=f"s/trials/{number}", values={}, params={},
        point=dict(point), curve=({"epoch": 1, "score": score},), started=START,
        ended=None if ended is None else START + timedelta(minutes=ended),
    )  # fmt: skip


def pair(number: int, psnr: float, defect: float, **more: object) -> TrialRecord:
    return trial(number, {"psnr": psnr, "defect_psnr": defect}, **more)  # type: ignore[arg-type]


def search(*trials: TrialRecord, origin: Mapping[str, float]) -> SearchRecord:
    return SearchRecord("s", ("psnr", "defect_psnr"), ExperimentConfig(), {}, trials, dict(origin))


def numbers(trials: list[TrialRecord]) -> list[int]:
    return [each.number for each in trials]


def brute_force(points: np.ndarray, origin: np.ndarray, cells: int) -> float:
    """Count the cells of a unit grid, whose corners the points share, that some point dominates."""
    corners = np.stack(np.meshgrid(*([np.arange(cells)] * points.shape[1])), -1).reshape(-1, points.shape[1]) + 1
    return float((corners[:, None] <= (points - origin)[None]).all(-1).any(-1).sum())


def test_the_front_is_what_no_complete_trial_dominates_best_first_objective_first() -> None:
    trials = [pair(0, 1, 5), pair(1, 3, 3), pair(2, 2, 2), pair(3, 5, 1), pair(4, 3, 2)]
    assert numbers(pareto_front(trials)) == [3, 1, 0]


def test_trials_that_did_not_end_are_on_no_front_and_push_nobody_off() -> None:
    trials = [pair(0, 9, 9, state="pruned"), pair(1, 9, 9, state="running"), pair(2, 1, 1)]
    assert numbers(pareto_front(trials)) == [2]
    assert pareto_front(trials[:2]) == []


def test_equal_trials_are_both_on_the_front_by_number() -> None:
    assert numbers(pareto_front([pair(4, 2, 2), pair(1, 2, 2), pair(0, 1, 2)])) == [1, 4]


@pytest.mark.parametrize(
    ("one", "other", "answer"),
    [((2, 2), (1, 2), True), ((2, 2), (2, 2), False), ((3, 1), (1, 3), False), ((1, 2), (2, 2), False)],
)
def test_one_dominates_that_is_nowhere_lower_and_somewhere_higher(
    one: tuple[float, float], other: tuple[float, float], answer: bool
) -> None:
    assert dominates(dict(zip("ab", one, strict=True)), dict(zip("ab", other, strict=True))) is answer


def test_the_hypervolume_is_the_area_under_the_staircase() -> None:
    assert hypervolume([(1, 3), (3, 1), (2, 2)], (0, 0)) == pytest.approx(6)
    assert hypervolume([(11, 23), (13, 21), (12, 22)], (10, 20)) == pytest.approx(6)
    assert hypervolume([(2.5,), (1.0,)], (0.5,)) == pytest.approx(2)


@pytest.mark.parametrize("origin", [(0.0,), (0.0, 0.0), (0.0, 0.0, 0.0)])
def test_points_that_are_not_above_the_origin_everywhere_count_nothing(origin: tuple[float, ...]) -> None:
    assert hypervolume([], origin) == 0
    assert hypervolume([(5.0,) * (len(origin) - 1) + (0.0,)], origin) == 0


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_hypervolume_agrees_with_counting_the_cells_below_the_points(objectives: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.integers(-1, 8, (9, objectives)) + 20
    origin = np.full(objectives, 20)
    assert hypervolume(points.tolist(), origin.tolist()) == pytest.approx(brute_force(points, origin, 8))


def test_the_hypervolume_grows_in_the_order_in_which_trials_ended() -> None:
    late, early, unfinished = pair(0, 13, 21, ended=9), pair(1, 11, 23, ended=2), pair(2, 30, 30, state="pruned")
    untimed = pair(3, 12, 22)
    record = search(late, early, unfinished, untimed, origin={"psnr": 10, "defect_psnr": 20})
    assert hypervolume_after(record) == pytest.approx([3, 5, 6])


def test_without_a_complete_trial_there_is_no_hypervolume_and_nothing_to_choose() -> None:
    record = search(pair(0, 1, 1, state="failed"), origin={})
    assert hypervolume_after(record) == []
    assert chosen(record) is None


def test_of_the_front_the_highest_score_is_chosen() -> None:
    trials = (pair(0, 1, 5, score=1.0), pair(1, 3, 3, score=2.0), pair(2, 5, 1, score=1.5), pair(3, 2, 2, score=9.0))
    record = search(*trials, origin={"psnr": 0, "defect_psnr": 0})
    best = chosen(record)
    assert best is not None and best.number == 1
