from typing import Any

import pytest

from kintsugi.config import ExperimentConfig
from kintsugi_tune import gauges
from kintsugi_tune.record import SearchRecord, TrialRecord


class Kept:
    """Remembers what a gauge of Ray's would export."""

    values: dict[tuple[str, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name = name

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[(self.name, *tags.values())] = value


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    Kept.values = {}
    monkeypatch.setattr(gauges, "Gauge", Kept)
    return Kept.values


def _trial(number: int, state: Any, psnr: float = 0.0) -> TrialRecord:
    curve = ({"epoch": 1.0, "score": 0.1, "val/psnr": psnr, "val/defect_psnr": psnr - 4},) if psnr else ()
    return TrialRecord(
        number=number, state=state, screened=False, label=None, run=f"s/{number}", values={}, params={}, point={},
        curve=curve, started=None, ended=None,
    )  # fmt: skip


def _record(*trials: TrialRecord) -> SearchRecord:
    return SearchRecord("s", ("psnr", "defect_psnr"), ExperimentConfig(), {}, trials, {})


def test_a_search_that_has_begun_nothing_counts_no_trial_of_any_state(
    exported: dict[tuple[str, ...], float],
) -> None:
    gauges.SearchGauges()(_record())
    states = ("running", "complete", "pruned", "failed")
    assert exported == {("kintsugi_tune_trials", "s", state): 0 for state in states}


def test_trials_are_counted_by_state_and_the_best_is_told(exported: dict[tuple[str, ...], float]) -> None:
    gauges.SearchGauges()(_record(_trial(0, "complete", 25.0), _trial(1, "complete", 26.5), _trial(2, "failed")))
    assert exported[("kintsugi_tune_trials", "s", "complete")] == 2
    assert exported[("kintsugi_tune_trials", "s", "failed")] == 1
    assert exported[("kintsugi_tune_best_db", "s", "psnr")] == 26.5
    assert exported[("kintsugi_tune_best_db", "s", "defect_psnr")] == 22.5
