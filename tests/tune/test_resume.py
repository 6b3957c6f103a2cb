"""A search that was killed goes on as if it had not been, wherever that was."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kintsugi.storage import MemoryStore
from kintsugi_tune.ledger import Ledger, Plan
from kintsugi_tune.record import SearchRecord

Plans = Callable[..., Plan]
Trainings = Callable[..., Any]
Timeless = Callable[[SearchRecord], SearchRecord]


class Killed(Exception):
    """The search ends here, as at a SIGKILL."""


class MortalStore(MemoryStore):
    """Kills whoever makes the write `fatal`, before or after it is done. Write 0 is the first."""

    def __init__(self, fatal: int = -1, *, stored: bool = False) -> None:
        super().__init__()
        self.fatal, self.stored, self.writes = fatal, stored, 0

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        write, self.writes = self.writes, self.writes + 1
        if write != self.fatal:
            super().put(key, data, if_none_match=if_none_match, if_match=if_match)
            return
        if self.stored:
            super().put(key, data, if_none_match=if_none_match, if_match=if_match)
        raise Killed


def own(store: MemoryStore, plan: Plan) -> Ledger:
    return Ledger(store, plan, owner=True)


def faulty(values: Mapping[str, Any], epoch: int) -> str | None:
    return "lost" if values["model.skips"].count("off") == 2 and epoch == 2 else None


SEARCHES = [
    {"trials": 5, "screened": 3, "epochs": 3, "screen_epochs": 2},
    {"trials": 5, "screened": 4, "epochs": 3, "screen_epochs": 3, "sampler": "tpe", "objectives": ["score"]},
    {"trials": 6, "screened": 0, "epochs": 2, "sampler": "tpe"},
    {"trials": 4, "screened": 2, "epochs": 2, "screen_epochs": 2, "constraints": ("model.dropout < 0.16",)},
]


@pytest.mark.parametrize("stored", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: f"{search['screened']} of {search['trials']}")
def test_a_search_that_is_killed_at_any_write_ends_as_if_it_had_not_been(
    plan_of: Plans, trainings: Trainings, timeless: Timeless, search: dict[str, Any], stored: bool
) -> None:
    plan = plan_of(**search)
    untouched = MortalStore()
    expected = timeless(trainings(faulty).search(own(untouched, plan)))
    assert untouched.writes > 15 and len({trial.run for trial in expected.trials}) == search["trials"]
    for fatal in range(untouched.writes):
        store, runs = MortalStore(fatal, stored=stored), trainings(faulty)
        with pytest.raises(Killed):
            runs.search(own(store, plan))
        assert timeless(runs.search(own(store, plan))) == expected, fatal


def test_a_guided_search_that_is_killed_ends_as_if_it_had_not_been(
    plan_of: Plans, trainings: Trainings, timeless: Timeless
) -> None:
    plan = plan_of(trials=6, screened=0, epochs=1, screen_epochs=1, sampler="gp")
    untouched = MortalStore()
    expected = timeless(trainings().search(own(untouched, plan)))
    for fatal in (untouched.writes - 4, untouched.writes - 2):
        store, runs = MortalStore(fatal), trainings()
        with pytest.raises(Killed):
            runs.search(own(store, plan))
        assert timeless(runs.search(own(store, plan))) == expected, fatal


def test_a_search_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    plan_of: Plans, trainings: Trainings, timeless: Timeless
) -> None:
    plan, store, runs, kills = plan_of(), MortalStore(), trainings(faulty), 0
    while True:
        store.fatal, store.stored = store.writes + 1 + kills % 3, kills % 2 == 0
        try:
            record = runs.search(own(store, plan))
            break
        except Killed:
            kills += 1
    assert kills > 15
    assert timeless(record) == timeless(trainings(faulty).search(own(MemoryStore(), plan)))
