"""`kintsugi tune`: search, tell the trials, publish the winner."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from kintsugi import cluster
from kintsugi.commands.console import Json, Sets, note, print_json, print_table, say
from kintsugi.commands.lookup import open_root_store
from kintsugi.commands.train import pin_dataset, publish_best
from kintsugi.config import load_config
from kintsugi_tune.space import load_space


def tune(
    space: Annotated[Path, typer.Argument(help="Search space, YAML: dotted config key -> distribution.")],
    config: Annotated[Path, typer.Option(help="Experiment config that the search starts from.")],
    name: Annotated[str, typer.Option(help="Name to publish the winner under.")] = "unet",
    search: Annotated[str | None, typer.Option(help="Name of the search below runs/.")] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Search hyper-parameters on the Ray cluster and publish the winner."""
    store = open_root_store()
    # Ray reads its token settings when it is imported: only now are they set.
    from kintsugi.training.launch import check_perceptual
    from kintsugi_tune.search import launch_search

    settings = pin_dataset(store, load_config(config, sets or ()))
    wanted = load_space(space)
    wanted.check(settings)
    check_perceptual(settings)
    search = search or f"search-{datetime.now():%Y%m%d-%H%M%S}"
    cluster.connect()
    note(f"search {search}: {settings.search.trials} trials of up to {settings.search.epochs} epochs")
    result = launch_search(settings, wanted, store.uri, search)
    version, card = publish_best(store, name, result.best.run)
    if as_json:
        trials = [{"run": t.run, "score": t.score, "epochs": t.epochs, "values": t.values} for t in result.trials]
        print_json({"model": version.ref, "digest": version.digest, "score": card.score, "trials": trials})
        return
    rows = [
        (t.run, "failed" if t.score is None else f"{t.score:+.2f} dB", t.epochs, _readable(t.values), t.error or "")
        for t in result.trials
    ]
    print_table(("trial", "best score", "epochs", "values", ""), rows)
    say(f"published {version.ref} with {card.score:+.2f} dB on the validation split")


def _readable(values: dict[str, object]) -> str:
    return "  ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in values.items())


def _short(value: object) -> str:
    if isinstance(value, dict):
        return "/".join(f"{float(share):.2f}" for share in value.values())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
