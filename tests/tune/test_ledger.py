"""A search is told what happens, and answers what comes next."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from kintsugi.config import with_values
from kintsugi.errors import TrainingError
from kintsugi.storage import LocalStore, MemoryStore
from kintsugi_tune.front import pareto_front
from kintsugi_tune.ledger import Ledger, Plan, Proposal, Stage, survivors
from kintsugi_tune.record import SearchRecord

Plans = Callable[..., Plan]
Trainings = Callable[..., Any]
Timeless = Callable[[SearchRecord], SearchRecord]
Figures = Callable[[Mapping[str, Any], int], dict[str, float]]


def own(store: MemoryStore, plan: Plan) -> Ledger:
    return Ledger(store, plan, owner=True)


def stages_by_name(store: MemoryStore, plan: Plan) -> dict[str, Stage]:
    return {stage.name: stage for stage in own(store, plan).stages()}


def proposals(stage: Stage) -> list[Proposal]:
    return list(iter(stage.next, None))


def finish(trainings: Any, stage: Stage) -> None:
    for proposal in proposals(stage):
        while not trainings.step(stage, proposal):
            pass


def test_a_search_tries_as_many_configs_for_as_many_epochs_as_asked(plan_of: Plans, trainings: Trainings) -> None:
    record = trainings().search(own(MemoryStore(), plan_of()))
    assert [trial.number for trial in record.trials] == [0, 1, 2, 3, 4, 5]
    assert [trial.run for trial in record.trials] == [f"s/trials/{number:04d}" for number in range(6)]
    assert all(trial.epochs == 5 for trial in record.complete)
    assert all(trial.epochs <= 3 and trial.screened for trial in record.trials if trial.state == "pruned")
    assert {trial.number for trial in record.complete} >= {0, 4, 5}
    assert [len(trial.curve) for trial in record.trials] == [trial.epochs for trial in record.trials]


def test_known_points_come_first_and_have_their_labels(plan_of: Plans, trainings: Trainings) -> None:
    plan = plan_of()
    record = trainings().search(own(MemoryStore(), plan))
    recipe, small, *others = record.trials
    assert (recipe.label, small.label) == ("recipe", "small") and not any(trial.label for trial in others)
    assert recipe.values == {"model.dropout": 0.15, "model.base": 64, "model.skips": ["off"] * 4}
    assert small.values == {"model.dropout": 0.0, "model.base": 8, "model.skips": ["concat"] * 4}


@pytest.mark.parametrize("screened", [1, 0])
def test_every_known_point_is_tried_however_few_are_screened(
    plan_of: Plans, trainings: Trainings, screened: int
) -> None:
    ledger = own(MemoryStore(), plan_of(trials=3, screened=screened))
    record = trainings().search(ledger)
    assert all(t.state is not TrialState.WAITING for stage in ledger.stages() for t in stage.study.get_trials())
    assert [trial.label for trial in record.trials] == ["recipe", "small", None]
    assert [trial.state for trial in record.trials] == ["complete"] * 3


def test_no_more_known_points_than_trials_are_tried(plan_of: Plans, trainings: Trainings) -> None:
    assert [t.label for t in trainings().search(own(MemoryStore(), plan_of(trials=1, screened=0))).trials] == ["recipe"]


def test_screened_trials_are_stopped_by_successive_halving(plan_of: Plans) -> None:
    """Rungs lie at epochs 1 and 2; with a factor of 2, who is below the better half is stopped there."""
    stage = stages_by_name(MemoryStore(), plan_of(screened=6, start={}))["screen"]
    scores = {0: [1.0, 1.0, 1.0], 1: [0.5], 2: [2.0, 2.0, 2.0], 3: [1.5, 1.0], 4: [0.9], 5: [3.0, 3.0, 3.0]}
    for proposal in proposals(stage):
        told = scores[proposal.number]
        stops = [stage.observe(proposal.number, {"epoch": e, "score": s}) for e, s in enumerate(told, start=1)]
        assert stops == [False] * (len(told) - 1) + [len(told) < 3]


def test_no_screened_trial_is_stopped_before_its_grace_is_over(plan_of: Plans) -> None:
    stage = stages_by_name(MemoryStore(), plan_of(grace_epochs=2, start={}))["screen"]
    first, second, *_ = proposals(stage)
    for score, proposal in ((1.0, first), (0.0, second)):
        assert not stage.observe(proposal.number, {"epoch": 1, "score": score})
    assert not stage.observe(first.number, {"epoch": 2, "score": 1.0})
    assert stage.observe(second.number, {"epoch": 2, "score": 0.0})


def test_who_came_to_the_end_of_screening_is_not_stopped_there(plan_of: Plans) -> None:
    """The last epoch may be a rung, too: with a factor of 3 they lie at epochs 1 and 3."""
    stage = stages_by_name(MemoryStore(), plan_of(reduction_factor=3, start={}))["screen"]
    for proposal, last in zip(proposals(stage)[:2], (2.0, 1.0), strict=True):
        told = [{"epoch": epoch, "score": score} for epoch, score in enumerate((1.0, 1.0, last), start=1)]
        assert [stage.observe(proposal.number, metrics) for metrics in told] == [False] * 3


def test_screening_learns_from_what_it_stopped_unless_chance_is_asked_for(plan_of: Plans, trainings: Trainings) -> None:
    def found(sampler: str) -> list[dict[str, Any]]:
        record = trainings().search(own(MemoryStore(), plan_of(trials=12, screened=12, start={}, sampler=sampler)))
        return [trial.values for trial in record.trials]

    chance, learnt = found("random"), found("tpe")
    assert chance[:8] == learnt[:8] and chance[8:] != learnt[8:]


def test_the_first_known_point_is_never_stopped_and_gets_the_full_budget(plan_of: Plans, trainings: Trainings) -> None:
    worst = {"model.dropout": 0.0, "model.base": 8, "model.skips": "off"}
    record = trainings().search(
        own(MemoryStore(), plan_of(start={"worst": worst}, trials=8, screened=8, reduction_factor=8))
    )
    scores = [trial.best["score"] for trial in record.trials]
    assert min(scores) == scores[0]
    assert (record.trials[0].state, record.trials[0].epochs) == ("complete", 5)
    assert any(trial.state == "pruned" and trial.epochs < 3 for trial in record.trials)


def test_a_stopped_trial_never_enters_the_front(plan_of: Plans, trainings: Trainings) -> None:
    record = trainings().search(own(MemoryStore(), plan_of(trials=12, screened=10, reduction_factor=3)))
    stopped = [trial for trial in record.trials if trial.state == "pruned"]
    front = pareto_front(record.trials)
    assert any(trial.epochs < 3 for trial in stopped)
    assert all(not trial.point for trial in stopped)
    assert front and not {trial.number for trial in front} & {trial.number for trial in stopped}
    assert {trial.number for trial in front} <= {trial.number for trial in record.complete}


def test_survivors_are_the_best_screened_trials_and_keep_number_and_run(plan_of: Plans, trainings: Trainings) -> None:
    store, plan, runs = MemoryStore(), plan_of(), trainings()
    ledger = own(store, plan)
    stages = ledger.stages()
    finish(runs, next(stages))
    screening = ledger.record()
    assert all(trial.screened for trial in screening.trials) and not screening.complete
    ended = [trial for trial in screening.trials if trial.epochs == 3]
    best = sorted(ended, key=lambda trial: -trial.best["score"])[:2]
    chosen = survivors(screening)
    assert chosen[:2] == best and [t.number for t in chosen[2:]] == [0] * (0 not in {t.number for t in best})
    full = next(stages)
    assert ledger.record() == screening
    again = [full.next() for _ in chosen]
    assert [(p.number, p.run, p.values, p.epochs) for p in again if p] == [
        (trial.number, trial.run, trial.values, 5) for trial in chosen
    ]
    assert (fresh := full.next()) is not None and (fresh.number, fresh.run) == (4, "s/trials/0004")


def test_a_survivors_curve_goes_on_from_screening(plan_of: Plans, trainings: Trainings, figures: Figures) -> None:
    trial = trainings().search(own(MemoryStore(), plan_of())).trials[0]
    assert list(trial.curve) == [figures(trial.values, epoch) for epoch in range(1, 6)]
    assert not trial.screened and trial.started is not None and trial.ended is not None
    best = max(trial.curve, key=lambda metrics: metrics["score"])
    assert best["epoch"] < 5
    assert trial.point == {"psnr": best["val/psnr"], "defect_psnr": best["val/defect_psnr"]}


def test_the_origin_is_what_the_degraded_images_have(plan_of: Plans, trainings: Trainings) -> None:
    origin = trainings().search(own(MemoryStore(), plan_of())).origin
    assert origin == pytest.approx({"score": 0, "psnr": 24, "defect_psnr": 20})


def test_without_screening_every_trial_gets_the_full_budget(plan_of: Plans, trainings: Trainings) -> None:
    store = MemoryStore()
    assert [stage.name for stage in own(store, plan_of(screened=0)).stages()] == ["full"]
    record = trainings().search(own(store, plan_of(screened=0)))
    assert [(trial.number, trial.state, trial.epochs) for trial in record.trials] == [
        (number, "complete", 5) for number in range(6)
    ]


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "auto"])
@pytest.mark.parametrize("objectives", [["score"], ["psnr", "defect_psnr"]])
def test_every_sampler_searches_one_objective_and_two(
    plan_of: Plans, trainings: Trainings, sampler: str, objectives: list[str]
) -> None:
    small = {"objectives": objectives, "trials": 6, "screened": 0, "epochs": 1, "screen_epochs": 1}
    record = trainings().search(own(MemoryStore(), plan_of(sampler=sampler, **small)))
    assert [(trial.state, set(trial.point)) for trial in record.trials] == [("complete", set(objectives))] * 6
    found = [trial.values for trial in record.trials]
    by_chance = [trial.values for trial in trainings().search(own(MemoryStore(), plan_of(**small))).trials]
    assert len(set(map(str, found))) == 6 and found[:4] == by_chance[:4]
    assert (found[4:] == by_chance[4:]) == (sampler == "random")


def test_two_searches_of_one_seed_are_the_same_and_of_another_are_not(
    plan_of: Plans, trainings: Trainings, timeless: Timeless
) -> None:
    one, two, other = (
        timeless(trainings().search(own(MemoryStore(), plan_of(sections={"train": {"seed": seed}}))))
        for seed in (0, 0, 1)
    )
    assert one == two
    assert [t.values for t in one.trials[:2]] == [t.values for t in other.trials[:2]]
    assert [t.values for t in one.trials[2:]] != [t.values for t in other.trials[2:]]


def test_every_proposal_obeys_the_constraints(plan_of: Plans, trainings: Trainings) -> None:
    texts = ("model.dropout < 0.1 or model.base == 8", "model.skips[0] == 'concat' or model.base == 64")
    plan = plan_of(constraints=texts, start={}, trials=20, screened=12)
    record = trainings().search(own(MemoryStore(), plan))
    assert len(record.trials) == 20
    for trial in record.trials:
        dropout, base, skips = (trial.values[f"model.{key}"] for key in ("dropout", "base", "skips"))
        assert (dropout < 0.1 or base == 8) and (skips[0] == "concat" or base == 64)
    unbound = trainings().search(own(MemoryStore(), replace(plan, space=plan_of(start={}).space)))
    assert any(t.values["model.dropout"] >= 0.1 and t.values["model.base"] > 8 for t in unbound.trials)


def test_a_space_without_an_allowed_point_ends_in_an_error(plan_of: Plans) -> None:
    stage = stages_by_name(MemoryStore(), plan_of(constraints=("model.dropout > 1",), start={}))["screen"]
    with pytest.raises(TrainingError, match="no allowed point was found"):
        stage.next()


def test_a_failed_trial_is_recorded_with_its_reason_and_never_ends_the_search(
    plan_of: Plans, trainings: Trainings
) -> None:
    runs = trainings(lambda values, epoch: "CUDA out of memory" if values["model.base"] > 8 and epoch > 1 else None)
    record = runs.search(own(MemoryStore(), plan_of()))
    failed = [trial for trial in record.trials if trial.state == "failed"]
    assert len(record.trials) == 6
    assert 0 < len(failed) < 6 and {trial.reason for trial in failed} == {"CUDA out of memory"}
    assert all(trial.epochs == 1 and not trial.point for trial in failed)
    assert not {trial.number for trial in failed} & {trial.number for trial in pareto_front(record.trials)}


def test_a_trial_that_fails_at_the_end_of_screening_does_not_survive(plan_of: Plans, figures: Figures) -> None:
    ledger = own(MemoryStore(), plan_of(start={}))
    stage = next(ledger.stages())
    for proposal in proposals(stage)[:2]:
        for epoch in (1, 2, 3):
            stage.observe(proposal.number, figures(proposal.values, epoch))
    stage.fail(0, "lost")
    stage.complete(1, figures(proposal.values, 3))
    assert [trial.number for trial in survivors(ledger.record())] == [1]


def test_a_search_whose_trials_all_fail_comes_to_its_end(plan_of: Plans, trainings: Trainings) -> None:
    record = trainings(lambda values, epoch: "no space left").search(own(MemoryStore(), plan_of()))
    assert [(trial.state, trial.epochs) for trial in record.trials] == [("failed", 0)] * 6
    assert {trial.reason for trial in record.trials} == {"no space left"}
    assert record.origin == {} and survivors(record) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_trial_whose_objectives_are_no_numbers_has_failed(plan_of: Plans, value: float | None) -> None:
    """As a validation subset without a defect, or weights that blew up at the last step."""
    ledger = own(MemoryStore(), plan_of(screened=0))
    stage = next(ledger.stages())
    assert stage.next() is not None
    odd = {} if value is None else {"val/defect_psnr": value, "val/defect_psnr_gain": value}
    stage.complete(0, {"epoch": 1, "score": 1.0, "val/psnr": 25.0, "val/psnr_gain": 1.0, **odd})
    (trial,) = ledger.record().trials
    assert trial.state == "failed" and trial.reason is not None and "val/defect_psnr" in trial.reason
    assert (again := stage.next()) is not None and again.number == 1


def test_a_search_can_be_read_while_it_runs(plan_of: Plans, trainings: Trainings, tmp_path: Path) -> None:
    store, plan, runs = LocalStore(tmp_path), plan_of(), trainings()
    reader = Ledger(store, plan, owner=False)
    assert reader.record().trials == () and reader.record().origin == {}
    ledger = Ledger(store, plan, owner=True)
    for stage in ledger.stages():
        for proposal in proposals(stage)[:1]:
            assert reader.record() == ledger.record()
            while not runs.step(stage, proposal):
                assert reader.record() == ledger.record() == Ledger(store, plan, owner=False).record()
    with pytest.raises(TrainingError, match="reading only"):
        next(reader.stages())


def test_a_search_that_was_stopped_proposes_first_what_was_under_way(plan_of: Plans, figures: Figures) -> None:
    store, plan = MemoryStore(), plan_of()
    stage = stages_by_name(store, plan)["screen"]
    begun = [proposal for proposal in (stage.next(), stage.next(), stage.next()) if proposal]
    stage.observe(1, figures(begun[1].values, 1))
    stage.fail(1, "lost")
    record = Ledger(store, plan, owner=False).record()
    assert [trial.state for trial in record.trials] == ["running", "failed", "running"]
    later = next(own(store, plan).stages())
    assert [later.is_running(number) for number in range(4)] == [True, False, True, False]
    assert [later.next(), later.next()] == [begun[0], begun[2]]
    assert (new := later.next()) is not None and new.number == 3
    assert later.next() is None


def test_trials_that_run_beside_each_other_are_each_begun_once(plan_of: Plans, trainings: Trainings) -> None:
    runs, store, plan = trainings(), MemoryStore(), plan_of(trials=8, screened=5)
    ledger = own(store, plan)
    for stage in ledger.stages():
        under_way: list[Proposal] = []
        while True:
            while len(under_way) < 3 and (proposal := stage.next()) is not None:
                under_way.append(proposal)
            if not under_way:
                break
            under_way = [proposal for proposal in under_way if not runs.step(stage, proposal)]
        assert stage.left == 0
    record = ledger.record()
    assert [trial.number for trial in record.trials] == list(range(8))
    assert "running" not in {trial.state for trial in record.trials}
    assert {trial.number for trial in record.complete} >= {0, 5, 6, 7}


def test_left_counts_down_as_trials_end(plan_of: Plans) -> None:
    stage = stages_by_name(MemoryStore(), plan_of())["screen"]
    left = [stage.left]
    for proposal, end in zip(proposals(stage), ("complete", "stopped", "fail", "complete"), strict=True):
        told: dict[str, Any] = {"complete": ({"epoch": 3, "score": 1.0},), "fail": ("lost",)}
        getattr(stage, end)(proposal.number, *told.get(end, ()))
        left.append(stage.left)
    assert left == [4, 3, 2, 1, 0]


def test_a_search_that_is_done_has_nothing_left_and_goes_on_when_more_is_asked(
    plan_of: Plans, trainings: Trainings, timeless: Timeless
) -> None:
    store, plan, runs = MemoryStore(), plan_of(), trainings()
    done = runs.search(own(store, plan))
    for stage in own(store, plan).stages():
        assert (stage.left, stage.next()) == (0, None)
        assert all(t.state is not TrialState.WAITING for t in stage.study.get_trials())
    more = replace(plan, config=with_values(plan.config, {"search.trials": 8}))
    record = runs.search(own(store, more))
    assert [trial.number for trial in record.trials] == list(range(8))
    assert record.trials[:6] == done.trials and {t.state for t in record.trials[6:]} == {"complete"}
