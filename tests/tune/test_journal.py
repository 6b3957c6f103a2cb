"""A study in an object store: one writes, all can read, and no two write."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from kintsugi.errors import PreconditionFailed, TrainingError
from kintsugi.storage import LocalStore, MemoryStore, ObjectStore
from kintsugi_tune.journal import StoreJournal

PREFIX = "runs/s/study"
READ = """
import sys
from pathlib import Path
import optuna
from kintsugi.storage import LocalStore
from kintsugi_tune.journal import StoreJournal
journal = StoreJournal(LocalStore(Path(sys.argv[1])), "runs/s/study", owner=False)
study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(journal))
print([(t.number, t.state.name, t.params, t.values, t.user_attrs, t.intermediate_values) for t in study.trials])
"""


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "store")


def journal_of(store: ObjectStore) -> StoreJournal:
    return StoreJournal(store, PREFIX, owner=True)


def study_of(journal: StoreJournal) -> optuna.Study:
    storage = JournalStorage(journal)
    return optuna.create_study(study_name="s", storage=storage, sampler=RandomSampler(0), load_if_exists=True)


def trials_in(store: ObjectStore) -> list[FrozenTrial]:
    """What one who only reads finds."""
    storage = JournalStorage(StoreJournal(store, PREFIX, owner=False))
    return optuna.load_study(study_name="s", storage=storage).get_trials()


def begin(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.suggest_categorical("kind", ["a", "b"])
    trial.set_user_attr("run", {"name": f"s/{trial.number}", "values": [1, 2.5, None]})
    return trial


def objects(store: ObjectStore) -> list[str]:
    return [info.key for info in store.list(f"{PREFIX}/")]


def test_a_study_is_read_back_equal_while_it_is_written(store: ObjectStore) -> None:
    journal = journal_of(store)
    study = study_of(journal)
    journal.flush()
    follower = optuna.load_study(study_name="s", storage=JournalStorage(StoreJournal(store, PREFIX, owner=False)))
    assert follower.get_trials() == []
    for step in range(3):
        trial = begin(study)
        trial.report(step / 3, step)
        journal.flush()
        assert follower.get_trials() == trials_in(store) == study.get_trials()
        assert follower.get_trials()[-1].state is TrialState.RUNNING
        study.tell(trial, step / 2)
        journal.flush()
        assert follower.get_trials() == trials_in(store) == study.get_trials()
    assert [trial.value for trial in follower.get_trials()] == [0, 0.5, 1]


def test_another_process_reads_the_same_study(tmp_path: Path) -> None:
    journal = journal_of(LocalStore(tmp_path))
    study = study_of(journal)
    study.tell(begin(study), 0.5)
    begin(study).report(0.25, 1)
    journal.flush()
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True)
    told = [(t.number, t.state.name, t.params, t.values, t.user_attrs, t.intermediate_values) for t in study.trials]
    assert done.stdout.strip() == str(told) and "RUNNING" in done.stdout


def test_an_owner_that_comes_later_goes_on_where_the_last_one_ended(store: ObjectStore) -> None:
    known: list[FrozenTrial] = []
    for turn in range(4):
        journal = journal_of(store)
        study = study_of(journal)
        assert study.get_trials() == known
        study.tell(begin(study), turn)
        journal.flush()
        known = study.get_trials()
    assert [trial.number for trial in known] == [0, 1, 2, 3] and trials_in(store) == known
    assert objects(store) == [f"{PREFIX}/{number:08d}.json" for number in range(4)]


def test_what_was_not_flushed_is_not_told_and_one_flush_is_one_object(store: ObjectStore) -> None:
    journal = journal_of(store)
    study = study_of(journal)
    journal.flush()
    study.tell(begin(study), 1.0)
    assert trials_in(store) == [] and len(objects(store)) == 1
    journal.flush()
    journal.flush()
    assert len(trials_in(store)) == 1 and len(objects(store)) == 2


def test_of_two_owners_the_second_to_flush_is_refused_and_nothing_is_lost_or_doubled(store: ObjectStore) -> None:
    study_of(first := journal_of(store))
    first.flush()
    one, two = journal_of(store), journal_of(store)
    ones, twos = study_of(one), study_of(two)
    ones.tell(begin(ones), 1.0)
    one.flush()
    twos.tell(begin(twos), 2.0)
    for _ in range(2):
        with pytest.raises(TrainingError, match=f"another process continues the search under {PREFIX}"):
            two.flush()
    assert [trial.value for trial in trials_in(store)] == [1.0]
    ones.tell(begin(ones), 3.0)
    one.flush()
    assert [trial.value for trial in trials_in(store)] == [1.0, 3.0]


def test_an_owner_notices_another_that_wrote_much_in_the_meantime(store: ObjectStore) -> None:
    one, two = journal_of(store), journal_of(store)
    ones, twos = study_of(one), study_of(two)
    for value in range(3):
        ones.tell(begin(ones), value)
        one.flush()
    twos.tell(begin(twos), 9.0)
    with pytest.raises(TrainingError):
        two.flush()
    assert [trial.value for trial in trials_in(store)] == [0, 1, 2]


def test_one_who_only_reads_cannot_write(store: ObjectStore) -> None:
    journal = journal_of(store)
    study_of(journal)
    journal.flush()
    storage = JournalStorage(StoreJournal(store, PREFIX, owner=False))
    with pytest.raises(TrainingError, match="open for reading only"):
        optuna.load_study(study_name="s", storage=storage).ask()
    assert len(objects(store)) == 1


class LostAnswers(MemoryStore):
    """Stores what it is given, and answers as S3 does to a request that was sent again after its answer was lost."""

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        super().put(key, data, if_none_match=if_none_match, if_match=if_match)
        raise PreconditionFailed(f"{key} exists already")


def test_a_write_whose_answer_was_lost_is_recognised_as_ours() -> None:
    store = LostAnswers()
    journal = journal_of(store)
    study = study_of(journal)
    for value in (1.0, 2.0):
        study.tell(begin(study), value)
        journal.flush()
    assert trials_in(store) == study.get_trials() and len(objects(store)) == 2


def test_the_same_entries_of_another_owner_are_not_taken_for_ours() -> None:
    """Two owners that append the very same, as after two starts with one seed, are still two."""
    store = MemoryStore()
    one, two = journal_of(store), journal_of(store)
    entry: dict[str, Any] = {"op_code": 0, "worker_id": "w", "study_name": "s", "directions": [1]}
    one.append_logs([entry])
    two.append_logs([entry])
    one.flush()
    with pytest.raises(TrainingError):
        two.flush()


def test_what_was_appended_is_not_what_others_may_change_since() -> None:
    journal = journal_of(MemoryStore())
    entry: dict[str, Any] = {"values": [1]}
    journal.append_logs([entry])
    entry["values"].append(2)
    assert list(journal.read_logs(0)) == [{"values": [1]}]


def test_reading_from_a_number_on_gives_what_came_since(store: ObjectStore) -> None:
    journal = journal_of(store)
    for number in range(5):
        journal.append_logs([{"entry": number}])
        journal.flush()
    for reader in (journal, StoreJournal(store, PREFIX, owner=False)):
        assert [entry["entry"] for entry in reader.read_logs(3)] == [3, 4]
        assert list(reader.read_logs(5)) == []
