"""kintsugi tune, tune report, tune publish, tune dashboard."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kintsugi import cluster
from kintsugi.commands.console import Json, Sets, note, print_json, print_table, say
from kintsugi.commands.lookup import open_root_store
from kintsugi.commands.models import show_verdict
from kintsugi.commands.train import initial_weights, pin_dataset, publish_best
from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.errors import ConfigError, TrainingError
from kintsugi.processes import free_ports
from kintsugi.storage import ObjectStore

if TYPE_CHECKING:
    from kintsugi_tune.ledger import Plan
    from kintsugi_tune.record import SearchRecord, TrialRecord

Search = Annotated[str, typer.Argument(help="Name of the search below runs/.")]


def tune(
    space: Annotated[
        Path | None, typer.Argument(help="Search space, YAML: dotted config key -> distribution.", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Experiment config that the search starts from.")] = None,
    name: Annotated[str, typer.Option(help="Name to publish the best model under.")] = "unet",
    search: Annotated[str | None, typer.Option(help="Name of the search below runs/.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="SEARCH", help="Go on with a search that was stopped or killed.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="How many configs to try.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="How many at the same time.")] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="Stop after so long; --resume goes on.")] = None,
    init_from: Annotated[
        str | None, typer.Option(metavar="NAME[@ALIAS|@NUMBER]", help="Start every trial from a published model.")
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Search settings on the Ray cluster and publish the best model.

    'kintsugi tune report SEARCH' shows what was found, 'tune publish' publishes another trial or promotes one,
    'tune dashboard' opens optuna-dashboard.
    """
    store = open_root_store()
    limits = {"trials": trials, "max_concurrent": max_concurrent, "budget_minutes": budget_minutes}
    changed = {f"search.{key}": value for key, value in limits.items() if value is not None}
    if resume is None:
        overrides = [*(sets or ()), *(f"{key}={value}" for key, value in changed.items())]
        plan = _new_plan(store, space, config, name, search, init_from, overrides)
    else:
        plan = _resumed_plan(store, resume, changed, (space, config, search, init_from, sets))
    done, record = _run(store, plan)
    best = _best(record)
    version, card = publish_best(store, plan.model, best.run)
    if as_json:
        told = [_as_json(trial) for trial in record.trials]
        print_json(
            {
                "model": version.ref, "digest": version.digest, "score": card.score, "search": plan.name,
                "done": done, "trial": best.number, "trials": told,
            }
        )  # fmt: skip
        return
    print_found(record)
    if not done:
        say(f"the search is not done: 'kintsugi tune --resume {plan.name}' goes on")
    say(f"published trial {best.number} as {version.ref}, {card.score:+.2f} dB on the validation split")
    say(f"'kintsugi tune report {plan.name}' shows what was found")


def report(
    search: Search,
    output: Annotated[Path | None, typer.Option(help="Default: SEARCH.html")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many of the worst images to show.")] = 6,
    scored: Annotated[int, typer.Option(min=1, help="How many validation images to restore and compare.")] = 60,
) -> None:
    """Write what a search found, by now, as one HTML page that needs nothing else."""
    from kintsugi_tune.ledger import Ledger, load_plan
    from kintsugi_tune.report import write_report

    store = open_root_store()
    record = Ledger(store, load_plan(store, search), owner=False).record()
    path = write_report(record, store, output or Path(f"{search}.html"), images=images, scored=scored)
    say(f"report {path}")


def dashboard(
    search: Search,
    port: Annotated[int, typer.Option(help="On 127.0.0.1; 0 takes a free one.")] = 8080,
) -> None:
    """Show a search in optuna-dashboard while it runs and afterwards, until interrupted."""
    from optuna_dashboard import run_server

    from kintsugi_tune.ledger import Ledger, load_plan

    store = open_root_store()
    ledger = Ledger(store, load_plan(store, search), owner=False)
    port = port or free_ports(1)[0]
    say(f"optuna-dashboard of {search}: http://127.0.0.1:{port}")
    run_server(ledger.storage, host="127.0.0.1", port=port)


def publish(
    search: Search,
    trial: Annotated[int | None, typer.Option(help="Default: of the front, the one with the highest score.")] = None,
    name: Annotated[str | None, typer.Option(help="Default: the name that the search was given.")] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="First train it for all train.epochs.")] = False,
    promote: Annotated[
        str | None,
        typer.Option(metavar="ALIAS", help="Promote it to this alias if it is not worse."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish a trial of a search with its scorecard on the test split; with --promote, put it into production."""
    store = open_root_store()
    from kintsugi.commands.promotion import promote_gated
    from kintsugi_tune.ledger import Ledger, load_plan

    plan = load_plan(store, search)
    record = Ledger(store, plan, owner=False).record()
    picked = _best(record) if trial is None else _numbered(record, trial)
    run = _retrained(store, plan, picked) if retrain else picked.run
    version, card = publish_best(store, name or plan.model, run, split="test")
    note(f"published trial {picked.number} as {version.ref}, {card.score:+.2f} dB on the test split")
    if promote is not None:
        promote_gated(store, version, promote, tell=None if as_json else show_verdict)
    if as_json:
        print_json({"model": version.ref, "trial": picked.number, "score": card.score, "alias": promote})
    elif promote is not None:
        say(f"{version.name}@{promote} is now version {version.number}")


def print_found(record: "SearchRecord") -> None:
    """The front, then all other trials."""
    from kintsugi_tune.front import pareto_front
    from kintsugi_tune.live import ending

    front = pareto_front(record.trials)
    others = [trial for trial in record.trials if trial not in front]
    rows = [("*" if trial in front else "", trial.number, ending(trial, record)) for trial in [*front, *others]]
    print_table(("", "trial", "*: no other is better in all objectives"), rows)


def _new_plan(
    store: ObjectStore,
    space: Path | None,
    config: Path | None,
    name: str,
    search: str | None,
    init_from: str | None,
    overrides: list[str],
) -> "Plan":
    if space is None or config is None:
        raise ConfigError("give a search space and --config, or --resume SEARCH")
    # Ray reads its token settings when it is imported: only now are they set.
    from kintsugi.training.launch import check_perceptual
    from kintsugi_tune.budget import check_budget
    from kintsugi_tune.ledger import Plan, check_plan, save_plan
    from kintsugi_tune.space import load_space

    settings = pin_dataset(store, load_config(config, overrides))
    init = None if init_from is None else initial_weights(store, init_from, settings)
    search = search or f"search-{datetime.now():%Y%m%d-%H%M%S}"
    plan = Plan(search, settings, load_space(space), init, name)
    check_plan(plan, store)
    check_perceptual(settings)
    check_budget(plan, store)
    save_plan(store, plan)
    return plan


def _resumed_plan(store: ObjectStore, search: str, changed: dict[str, Any], others: tuple[Any, ...]) -> "Plan":
    from dataclasses import replace

    from kintsugi_tune.ledger import load_plan

    if any(others):
        raise ConfigError("--resume takes the space and the config from the search: leave them and --set away")
    plan = load_plan(store, search)
    return replace(plan, config=with_values(plan.config, changed))


def _run(store: ObjectStore, plan: "Plan") -> "tuple[bool, SearchRecord]":
    from kintsugi_tune.ledger import Ledger
    from kintsugi_tune.search import run_search

    limits = plan.config.search
    cluster.connect(worker_output=False)
    note(
        f"search {plan.name}: {limits.trials} trials, {limits.screened} of them screened for {limits.screen_epochs} "
        f"epochs, the rest for {limits.epochs}; dataset {plan.config.data.dataset}"
    )
    ledger = Ledger(store, plan, owner=True)
    done = run_search(ledger, store.uri, max_concurrent=limits.max_concurrent, budget_minutes=limits.budget_minutes)
    return done, ledger.record()


def _best(record: "SearchRecord") -> "TrialRecord":
    """The chosen member of the front; while there is none, the trial that came furthest."""
    from kintsugi_tune.front import chosen

    trained = [trial for trial in record.trials if trial.curve and trial.state != "failed"]
    best = chosen(record) or max(trained, key=lambda trial: trial.score, default=None)
    if best is None:
        reason = next((trial.reason for trial in record.trials if trial.reason), "none came to the end of an epoch")
        raise TrainingError(f"no trial of {record.name} has a model: {reason}")
    return best


def _numbered(record: "SearchRecord", number: int) -> "TrialRecord":
    found = next((trial for trial in record.trials if trial.number == number and trial.curve), None)
    if found is None:
        there = ", ".join(str(trial.number) for trial in record.trials if trial.curve)
        raise ConfigError(f"{record.name} has no trial {number} with a model: there are {there or 'none'}")
    return found


def _retrained(store: ObjectStore, plan: "Plan", trial: "TrialRecord") -> str:
    from kintsugi.training.launch import launch_training

    config: ExperimentConfig = with_values(plan.config, trial.values)
    run = f"{plan.name}/retrained/{trial.number:04d}"
    cluster.connect()
    note(f"run {run}: {config.train.workers} workers, {config.train.epochs} epochs")
    launch_training(config, store.uri, run, init=plan.init)
    return run


def _as_json(trial: "TrialRecord") -> dict[str, Any]:
    score = trial.best.get("score")
    return {
        "number": trial.number, "run": trial.run, "state": trial.state, "score": score, "point": trial.point,
        "epochs": trial.epochs, "values": trial.values, "reason": trial.reason,
    }  # fmt: skip
