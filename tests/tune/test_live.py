"""What the person who watches a search reads."""

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from kintsugi.storage import MemoryStore
from kintsugi_tune.ledger import Ledger, Plan
from kintsugi_tune.live import Live, ending, readable, search_table, seconds_wanted
from kintsugi_tune.record import SearchRecord, TrialRecord

Plans = Callable[..., Plan]
Figures = Callable[[Mapping[str, Any], int], dict[str, float]]
VALUES = {
    "loss.weights": {"defect": 0.25, "ssim": 0.75, "edge": 0.0},
    "model.skips": ["off", "add"],
    "optim.learning_rate": 0.00123,
    "model.base": 16,
}


def trial_of(
    number: int, state: Any = "complete", psnr: float = 25.0, defect: float = 21.0, **more: Any
) -> TrialRecord:
    curve = tuple(
        {"epoch": epoch, "score": epoch / 10, "val/psnr": psnr + epoch - 3, "val/defect_psnr": defect + epoch - 3}
        for epoch in (1, 2, 3)
    )
    point = {"psnr": psnr, "defect_psnr": defect} if state == "complete" else {}
    trial = TrialRecord(
        number=number, state=state, screened=False, label=None, run=f"s/trials/{number:04d}", values=VALUES,
        params={}, point=point, curve=curve, started=None, ended=None,
    )  # fmt: skip
    return replace(trial, **more)


@pytest.fixture
def record_of(plan_of: Plans) -> Callable[..., SearchRecord]:
    def record(*trials: TrialRecord, **search: Any) -> SearchRecord:
        config = plan_of(**search).config
        return SearchRecord("s", tuple(config.search.objectives), config, {}, trials, {})

    return record


def rows(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))


def test_the_table_has_a_row_for_each_trial_and_a_star_for_those_in_front(
    record_of: Callable[..., SearchRecord],
) -> None:
    trials = [
        trial_of(0, psnr=25.0, defect=21.0, label="recipe"),
        trial_of(1, psnr=26.0, defect=20.0),
        trial_of(2, psnr=24.0, defect=20.5),
        trial_of(3, "pruned", psnr=30.0, defect=30.0, screened=True),
        trial_of(4, "failed", psnr=31.0, defect=31.0, reason="lost"),
        trial_of(5, "running", curve=()),
    ]
    table = search_table(record_of(*trials), None)
    found = rows(table)
    assert [(mark, number) for mark, number, *_ in found] == [
        ("*", "0"), ("*", "1"), ("", "2"), ("", "3"), ("", "4"), ("", "5"),
    ]  # fmt: skip
    assert found[0][2:6] == ("complete (recipe)", "3/5", "25.00", "21.00")
    assert found[3][2:6] == ("pruned", "3/3", "30.00", "30.00")
    assert found[5][2:6] == ("running", "0/5", "-", "-")
    assert table.title == "s: 5 of 6 trials ended"
    assert [str(column.header) for column in table.columns][4:6] == ["PSNR, dB", "defect PSNR, dB"]


def test_the_table_tells_the_time_that_is_left(record_of: Callable[..., SearchRecord]) -> None:
    assert search_table(record_of(), 600.0).title == "s: 0 of 6 trials ended, 10 min left"


def test_of_many_trials_the_table_shows_the_front_the_last_and_those_under_way_at_its_foot(
    record_of: Callable[..., SearchRecord],
) -> None:
    others = [trial_of(number, psnr=24.0) for number in range(2, 30)]
    trials = [trial_of(0, "running"), trial_of(1, psnr=26.0), *others]
    numbers = [row[1] for row in rows(search_table(record_of(*trials), None))]
    assert numbers == ["1", *map(str, range(12, 30)), "0"]


def test_the_time_that_is_left_follows_from_the_epochs_so_far(record_of: Callable[..., SearchRecord]) -> None:
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    took = {"started": begun, "ended": begun + timedelta(seconds=30)}
    record = record_of(*(trial_of(number, **took) for number in range(2)), trials=4, screened=0, max_concurrent=2)
    assert len(record.trials[0].curve) == 3
    wanted = 4 * record.config.search.epochs - 6
    assert seconds_wanted(record) == pytest.approx(wanted * 10 / 2)
    assert seconds_wanted(record_of(trial_of(0, "running"))) is None


def test_values_are_written_in_few_letters() -> None:
    assert readable(trial_of(0)) == "weights: defect 0.25, ssim 0.75; skips: off, add; learning rate: 0.00123; base: 16"


def test_the_ending_of_a_complete_trial_has_its_figures_and_values(record_of: Callable[..., SearchRecord]) -> None:
    told = ending(trial_of(0), record_of())
    assert told == f"complete after 3 epochs  psnr 25.00 dB  defect_psnr 21.00 dB  {readable(trial_of(0))}"
    assert ending(trial_of(0), record_of(objectives=["score"])).startswith("complete after 3 epochs  score 0.30 dB  ")


def test_the_ending_of_a_stopped_trial_says_when_it_was_stopped(record_of: Callable[..., SearchRecord]) -> None:
    stopped = trial_of(0, "pruned", screened=True)
    assert ending(replace(stopped, curve=stopped.curve[:1]), record_of()).startswith("stopped after 1 epochs  psnr 23.")


def test_a_trial_that_was_screened_or_is_under_way_was_not_stopped(record_of: Callable[..., SearchRecord]) -> None:
    assert ending(trial_of(0, "pruned", screened=True), record_of()).startswith("screened after 3 epochs  psnr 25.")
    assert ending(trial_of(0, "running"), record_of()).startswith("under way after 3 epochs  psnr 25.")


def test_the_ending_of_a_failed_trial_has_its_reason(record_of: Callable[..., SearchRecord]) -> None:
    failed = trial_of(0, "failed", reason="CUDA out of memory")
    assert ending(failed, record_of()) == "failed after 3 epochs: CUDA out of memory"
    assert ending(replace(failed, curve=()), record_of()) == "failed after 0 epochs: CUDA out of memory"


def watched(ledger: Ledger, trainings: Any, live: Live) -> None:
    """Run a search, and have it shown at every step, however little time has passed."""
    for stage in ledger.stages():
        while (proposal := stage.next()) is not None:
            while not trainings.step(stage, proposal):
                live._shown = 0.0
                live.show()
            live._shown = 0.0
            live.show()


def test_without_a_terminal_each_trial_that_ended_gets_one_line_once(
    plan_of: Plans, trainings: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(MemoryStore(), plan_of(trials=7, screened=4), owner=True)
    runs = trainings(lambda values, epoch: "lost" if values["model.base"] == 8 and epoch == 2 else None)
    with Live(ledger, None, Console(file=io.StringIO())) as live:
        watched(ledger, runs, live)
    lines = capsys.readouterr().err.splitlines()
    record = ledger.record()
    assert {trial.state for trial in record.trials} == {"complete", "pruned", "failed"}
    survived = [trial.number for trial in record.complete if trial.number < 4]
    assert survived and len(lines) == len(record.trials) + len(survived)
    for trial in record.trials:
        told = [line for line in lines if line.startswith(f"s trial {trial.number:3d} ")]
        assert told[-1] == f"s trial {trial.number:3d} {ending(trial, record)}"
        assert ["screened after 3 epochs" in line for line in told[:-1]] == [True] * (trial.number in survived)


def test_the_last_trial_is_told_when_the_search_ends_though_it_was_shown_just_before(
    plan_of: Plans, figures: Figures, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(MemoryStore(), plan_of(trials=1, screened=0), owner=True)
    with Live(ledger, None, Console(file=io.StringIO())) as live:
        stage = next(ledger.stages())
        proposal = stage.next()
        assert proposal is not None
        live.show()
        stage.complete(0, figures(proposal.values, 1))
        live.show()
    assert [line[:22] for line in capsys.readouterr().err.splitlines()] == ["s trial   0 complete a"]


def test_a_terminal_gets_the_table_and_no_lines(
    plan_of: Plans, trainings: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    ledger = Ledger(MemoryStore(), plan_of(), owner=True)
    with Live(ledger, None, Console(file=screen, force_terminal=True, width=120)) as live:
        watched(ledger, trainings(), live)
    assert capsys.readouterr().err == "" and "s trial " not in screen.getvalue()
    assert "s: 6 of 6 trials ended" in screen.getvalue() and "complete (recipe)" in screen.getvalue()
