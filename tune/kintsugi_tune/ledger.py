"""The ledger of a search: which configs are tried, what became of them, which come next.

runs/<search>/search.json          what was asked for
runs/<search>/study/<n>.json       an Optuna journal of two studies: `screen` and `full`
runs/<search>/trials/<number>/     the training runs

It knows nothing of Ray: whoever runs trials asks for the next one, tells each epoch and tells the end. Every answer is
a function of the search's seed, the trial's number and of what was told before, so that a search that was killed goes
on as if it had not been.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from kintsugi.config import ExperimentConfig, parse_config, with_values
from kintsugi.data.dataset import open_split
from kintsugi.data.sample import GOOD
from kintsugi.errors import ConfigError, ObjectNotFound, PreconditionFailed, TrainingError
from kintsugi.storage import LONG, ObjectStore, open_store
from kintsugi_tune.journal import StoreJournal
from kintsugi_tune.record import METRICS, SearchRecord, State, TrialRecord
from kintsugi_tune.space import BoundSpace, Space

StageName = Literal["screen", "full"]
_TPE_FROM = 201
_STARTUP = 4
"""Complete trials before a model of them is worth more than chance."""
_SCREENED_STARTUP = 8
_GUIDED_DRAWS, _DRAWS = 20, 1000
_FIXED = ("data.dataset", "train.epochs", "train.patience", "train.workers", "train.min_workers", "train.seed")
_EPOCH = "epoch:"
_STATES: Mapping[TrialState, State] = {
    TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a search was asked for.

    Args:
        config: what trials start from; its dataset is named by digest.
        init: prefix in the store of a model version whose weights every trial starts from.
        model: name to publish under.
    """

    name: str
    config: ExperimentConfig
    space: Space
    init: str | None = None
    model: str = "unet"

    @property
    def root(self) -> str:
        return f"runs/{self.name}"

    def to_json(self) -> bytes:
        parts = {"config": self.config.model_dump(mode="json"), "space": self.space.model_dump(mode="json")}
        return json.dumps({**parts, "init": self.init, "model": self.model}, indent=1).encode()


@dataclass(frozen=True)
class Proposal:
    """A trial to run: `values` over the plan's config, for `epochs`."""

    number: int
    run: str
    values: dict[str, Any]
    epochs: int
    label: str | None


def save_plan(store: ObjectStore, plan: Plan) -> None:
    """Begin a search.

    Raises:
        ConfigError: there is one of that name.
    """
    try:
        store.put(f"{plan.root}/search.json", plan.to_json(), if_none_match=True)
    except PreconditionFailed as error:
        raise ConfigError(
            f"there is a search {plan.name} already: continue it with --resume {plan.name}, or choose another --search"
        ) from error


def load_plan(store: ObjectStore, name: str) -> Plan:
    """What a search was asked for.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        tree = json.loads(store.get(f"runs/{name}/search.json"))
    except ObjectNotFound as error:
        found = sorted(i.key.split("/")[1] for i in store.list("runs/") if i.key.endswith("/search.json"))
        told = f"there are {', '.join(found)}" if found else "there is none yet"
        raise ConfigError(f"{store.uri} holds no search {name}: {told}") from error
    space = Space.model_validate(tree["space"])
    return Plan(name, parse_config(tree["config"], "search"), space, tree["init"], tree["model"])


def check_plan(plan: Plan, store: ObjectStore) -> None:
    """Find what cannot work before anything starts.

    Raises:
        ConfigError: naming the key, the known point or the constraint that cannot work, weights that do not fit every
            trial, or objectives that the validation images do not have.
    """
    fixed = [key for key in plan.space.parameters if key in _FIXED or key.startswith("search.")]
    if fixed:
        raise ConfigError(
            f"the space varies {', '.join(fixed)}, which a search sets for its trials: take that out of it"
        )
    BoundSpace(plan.space, plan.config).check()
    trial_config(plan, {}, plan.config.search.epochs)
    for point in plan.space.start.values():
        trial_config(plan, point, plan.config.search.epochs)
    shaping = [key for key in plan.space.parameters if key.startswith("model.") and key != "model.dropout"]
    if plan.init and shaping:
        raise ConfigError(
            f"--init-from needs models of one shape, and the space varies {', '.join(shaping)}: take that out of it"
        )
    dataset = plan.config.data.dataset
    if "defect_psnr" in plan.config.search.objectives and {*open_split(store, dataset, "val").defect_types} <= {GOOD}:
        raise ConfigError(f"no validation image of {dataset} has a defect: set search.objectives=[psnr], or [score]")


def trial_config(plan: Plan, values: Mapping[str, Any], epochs: int) -> ExperimentConfig:
    """What one trial trains: never stopped by its own patience, since others decide who goes on."""
    workers = plan.config.search.workers_per_trial
    budget = {"train.epochs": epochs, "train.patience": epochs, "train.workers": workers, "train.min_workers": None}
    return with_values(plan.config, {**budget, **values})


class Ledger:
    """A search in a store.

    Args:
        owner: whether this process runs the search; others may read while it runs.
    """

    def __init__(self, store: ObjectStore, plan: Plan, *, owner: bool) -> None:
        # A search outlives a store that is away for minutes.
        patient = open_store(store.uri, LONG) if owner and store.uri.startswith("s3://") else store
        self.plan = plan
        self.space = BoundSpace(plan.space, plan.config)
        self._journal = StoreJournal(patient, f"{plan.root}/study", owner=owner)
        self.storage = optuna.storages.JournalStorage(self._journal)

    def stages(self) -> Iterator["Stage"]:
        """What is left to do, in order; a stage is entered once the one before has ended."""
        if self.plan.config.search.screened:
            yield self._stage("screen")
        yield self._stage("full")

    def record(self) -> SearchRecord:
        """What is known by now."""
        studies = {study.study_name: study for study in optuna.get_all_study_summaries(self.storage)}
        found: dict[int, list[tuple[StageName, FrozenTrial]]] = {}
        for name in ("screen", "full"):
            if name in studies:
                for trial in optuna.load_study(study_name=name, storage=self.storage).get_trials(deepcopy=False):
                    if "number" in trial.user_attrs and trial.state is not TrialState.WAITING:
                        found.setdefault(trial.user_attrs["number"], []).append((name, trial))
        trials = tuple(_told(number, found[number], self.plan) for number in sorted(found))
        return SearchRecord(
            name=self.plan.name,
            objectives=tuple(self.plan.config.search.objectives),
            config=self.plan.config,
            distributions=dict(self.space.distributions),
            trials=trials,
            origin=next((_origin(trial.curve[0]) for trial in trials if trial.curve), {}),
        )

    def _stage(self, name: StageName) -> "Stage":
        search = self.plan.config.search
        objectives = 1 if name == "screen" else len(search.objectives)
        pruner = optuna.pruners.SuccessiveHalvingPruner(search.grace_epochs, search.reduction_factor)
        study = optuna.create_study(
            study_name=name,
            storage=self.storage,
            directions=[StudyDirection.MAXIMIZE] * objectives,
            sampler=RandomSampler(0),  # each proposal has its own; Optuna's for two objectives would write to the study
            pruner=pruner if name == "screen" else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        stage = Stage(name, study, self)
        if not study.user_attrs.get("filled"):
            self._fill(stage)
            study.set_user_attr("filled", True)
        self.flush()
        return stage

    def _fill(self, stage: "Stage") -> None:
        """Put the survivors of screening into the queue, and the known points that were not screened."""
        search = self.plan.config.search
        first, end = (0, search.screened) if stage.name == "screen" else (search.screened, search.trials)
        if stage.name == "full" and search.screened:
            for trial in survivors(self.record()):
                attributes = {"number": trial.number, "label": trial.label, "run": trial.run, "survivor": True}
                stage.enqueue(trial.params, attributes)
        for label, point in list(self.plan.space.start.items())[first:end]:
            stage.enqueue(self.space.params(point), {"label": label})

    def flush(self) -> None:
        self._journal.flush()


class Stage:
    """One study of a search: `screen`, where trials are stopped early, or `full`."""

    def __init__(self, name: StageName, study: optuna.Study, ledger: Ledger) -> None:
        self.name, self.study, self._ledger = name, study, ledger
        search = ledger.plan.config.search
        self.epochs = search.screen_epochs if name == "screen" else search.epochs
        self._running = {
            int(trial.user_attrs["number"]): Trial(study, trial._trial_id)  # pyright: ignore[reportPrivateUsage]
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if "number" in trial.user_attrs
        }
        self._to_continue = sorted(self._running)

    @property
    def wanted(self) -> int:
        """How many trials it has when it is done."""
        search = self._ledger.plan.config.search
        if self.name == "screen":
            return search.screened
        return search.trials - search.screened + sum("survivor" in trial.user_attrs for trial in self._trials())

    @property
    def left(self) -> int:
        """How many trials have yet to end."""
        ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        return max(0, self.wanted - sum(t.state in ended and "number" in t.user_attrs for t in self._trials()))

    def enqueue(self, params: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        self.study.enqueue_trial(dict(params), user_attrs=dict(attributes))

    def next(self) -> Proposal | None:
        """One that was begun and not ended, else a new one; None when there are enough."""
        if self._to_continue:
            return self._proposal(self._running[self._to_continue.pop(0)])
        begun = sum(t.state is not TrialState.WAITING and "number" in t.user_attrs for t in self._trials())
        if begun >= self.wanted:
            return None
        trial = self._ask(begun)
        number = int(trial.user_attrs.get("number", self._next_number()))
        if "number" not in trial.user_attrs:
            trial.set_user_attr("run", f"{self._ledger.plan.name}/trials/{number:04d}")
            trial.set_user_attr("number", number)
        self._running[number] = trial
        self._ledger.flush()
        return self._proposal(trial)

    def observe(self, number: int, metrics: Mapping[str, float]) -> bool:
        """Note an epoch of a trial; whether to stop the trial here."""
        trial, epoch = self._running[number], int(metrics["epoch"])
        key = f"{_EPOCH}{epoch}"
        if key in trial.user_attrs:
            return bool(trial.user_attrs.get("stop", False))  # a search that was killed may not have heard it
        trial.set_user_attr(key, dict(metrics))
        stop = False
        if self.name == "screen":
            trial.report(metrics["score"], epoch)
            # The first known point is judged like the others, which it may stop, and goes on in any case.
            stop = trial.should_prune() and epoch < self.epochs and not self._is_reference(trial)
            trial.set_user_attr("stop", stop)
        self._ledger.flush()
        return stop

    def complete(self, number: int, best: Mapping[str, float]) -> None:
        """Note the end of a trial; `best` are the metrics of its best checkpoint. Without numbers it has failed."""
        self.observe(number, best)
        search = self._ledger.plan.config.search
        names = [METRICS[name] for name in (["score"] if self.name == "screen" else search.objectives)]
        values = [best.get(name, math.nan) for name in names]
        if not all(map(math.isfinite, values)):
            told = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
            self.fail(number, f"its best checkpoint cannot be compared: {told}")
            return
        self._running[number].set_user_attr("best", dict(best))
        self._end(number, TrialState.COMPLETE, values)

    def stopped(self, number: int) -> None:
        """Note that a trial was stopped early: it never counts as complete."""
        self._end(number, TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        self._running[number].set_user_attr("reason", reason)
        self._end(number, TrialState.FAIL)

    def is_running(self, number: int) -> bool:
        return number in self._running

    def _end(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        self.study.tell(self._running.pop(number), values, state=state)
        self._ledger.flush()

    def _ask(self, begun: int) -> Trial:
        """The next trial that the space accepts; the searcher's word first, then chance."""
        space = self._ledger.space
        for draw in range(_DRAWS):
            self.study.sampler = self._sampler(1000 * begun + draw, guided=draw < _GUIDED_DRAWS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                trial = self.study.ask(space.distributions)
            values = space.values(trial.params)
            try:
                trial_config(self._ledger.plan, space.accepted(values) and values, self.epochs)
            except ConfigError as error:
                trial.set_user_attr("rejected", str(error))
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                trial.set_user_attr("values", values)
                return trial
        raise TrainingError(f"no allowed point was found in {_DRAWS} draws: loosen the constraints of the space")

    def _sampler(self, salt: int, *, guided: bool) -> BaseSampler:
        search, seed = self._ledger.plan.config.search, self._ledger.plan.config.train.seed
        seed = (1_000_003 * seed + salt + (0 if self.name == "screen" else 500_000)) & 0x7FFFFFFF
        if not guided or search.sampler == "random":
            return RandomSampler(seed)
        if self.name == "screen":  # it learns from stopped trials too, and fast
            return TPESampler(seed=seed, n_startup_trials=_SCREENED_STARTUP, multivariate=True, constant_liar=True)
        if search.sampler == "tpe" or (search.sampler == "auto" and self.wanted >= _TPE_FROM):
            return TPESampler(seed=seed, n_startup_trials=_STARTUP, multivariate=True, constant_liar=True)
        return GPSampler(seed=seed, n_startup_trials=_STARTUP)

    def _is_reference(self, trial: Trial) -> bool:
        return trial.user_attrs.get("label") in list(self._ledger.plan.space.start)[:1]

    def _next_number(self) -> int:
        """Numbers go on from screening, whose survivors keep theirs."""
        taken = [t.user_attrs["number"] for t in self._trials() if "number" in t.user_attrs]
        screened = self._ledger.plan.config.search.screened if self.name == "full" else 0
        return max([screened - 1, *taken]) + 1

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _proposal(self, trial: Trial) -> Proposal:
        known = trial.user_attrs
        return Proposal(int(known["number"]), known["run"], known["values"], self.epochs, known.get("label"))


def survivors(record: SearchRecord) -> list[TrialRecord]:
    """The screened trials that get the full budget: the best by score, and the first known point."""
    search = record.config.search
    screened = [trial for trial in record.trials if trial.screened]
    ended = [t for t in screened if t.state != "failed" and t.epochs >= search.screen_epochs]
    best = sorted(ended, key=lambda trial: -trial.score)[: -(-len(screened) // search.reduction_factor)]
    reference = [trial for trial in ended if trial.number == 0 and trial.label and trial not in best]
    return [*best, *reference]


def _told(number: int, parts: list[tuple[StageName, FrozenTrial]], plan: Plan) -> TrialRecord:
    name, last = parts[-1]
    # What is told again when a trial goes on is told without its times.
    told = [known for _, part in reversed(parts) for known in part.user_attrs.items()]
    epochs = {key: metrics for key, metrics in told if key.startswith(_EPOCH)}
    best = last.user_attrs.get("best", {})
    state = _STATES.get(last.state, "running")
    # What was only screened was not tried in full, however far it came.
    state = "pruned" if state == "complete" and name == "screen" else state
    return TrialRecord(
        number=number,
        state=state,
        screened=name == "screen",
        label=last.user_attrs.get("label"),
        run=last.user_attrs["run"],
        values=last.user_attrs["values"],
        params=last.params,
        point={key: best[METRICS[key]] for key in plan.config.search.objectives} if state == "complete" else {},
        curve=tuple(sorted(epochs.values(), key=lambda metrics: metrics["epoch"])),
        started=parts[0][1].datetime_start,
        ended=last.datetime_complete,
        reason=last.user_attrs.get("reason"),
    )


def _origin(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the degraded images have, untouched."""
    gains = {"psnr": "val/psnr", "defect_psnr": "val/defect_psnr"}
    found = {key: metrics[name] - metrics[f"{name}_gain"] for key, name in gains.items() if name in metrics}
    return {"score": 0.0, **found}
