"""kintsugi models list, show, promote, rollback."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kintsugi.commands.console import Json, Model, print_json, print_table, say
from kintsugi.commands.lookup import fetch_model, open_root_store
from kintsugi.storage import ObjectStore

if TYPE_CHECKING:
    from kintsugi.evaluation.gate import Verdict
    from kintsugi.registry import Registry


def list_(as_json: Json = False) -> None:
    """List every published version and the aliases that point at it."""
    registry = _registry(open_root_store())
    versions = [version for name in registry.names() for version in registry.versions(name)]
    if as_json:
        print_json([version.model_dump() for version in versions])
        return
    aliases = {name: registry.aliases(name) for name in registry.names()}
    rows = [
        (
            version.ref,
            ", ".join(alias for alias, number in aliases[version.name].items() if number == version.number),
            f"{version.scores.get('score', float('nan')):+.2f} dB",
            version.digest[:12],
            version.created,
        )
        for version in versions
    ]
    print_table(("model", "alias", "validation score", "digest", "created"), rows)


def show(model: Model, as_json: Json = False) -> None:
    """Show one version: scores, alias history, config."""
    store = open_root_store()
    version, folder = fetch_model(store, model)
    registry = _registry(store)
    history = {
        alias: [move.model_dump() for move in registry.alias_history(version.name, alias)]
        for alias in registry.aliases(version.name)
    }
    card = json.loads((folder / "card.json").read_text())
    if as_json:
        print_json({**version.model_dump(), "card": card, "aliases": history})
        return
    print_table(("", ""), [(key, _short(value)) for key, value in {**version.model_dump(), **card}.items()])
    for alias, moves in history.items():
        say(f"{alias}: " + ", ".join(f"{move['action']} {move['version']} ({move['moved']})" for move in moves))
    say((folder / "config.yaml").read_text())


def promote(
    model: Model,
    alias: Annotated[str, typer.Option(help="Which alias to move.")] = "production",
    gate: Annotated[
        bool, typer.Option("--gate", help="Only if no worse than what the alias names, on the test split.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Point an alias at a version."""
    store = open_root_store()
    registry = _registry(store)
    version = registry.resolve(model)
    if gate:
        from kintsugi.commands.promotion import promote_gated

        promote_gated(store, version, alias, tell=print_verdict if as_json else show_verdict)
    else:
        registry.promote(version.ref, alias)
        if as_json:
            print_json(version.model_dump())
    if not as_json:
        say(f"{version.name}@{alias} is now version {version.number} ({version.digest[:12]})")


def rollback(
    name: Annotated[str, typer.Argument()],
    alias: Annotated[str, typer.Option(help="Which alias to move.")] = "production",
) -> None:
    """Take back the last promotion."""
    version = _registry(open_root_store()).rollback(name, alias)
    say(f"{version.name}@{alias} is back at version {version.number} ({version.digest[:12]})")


def _registry(store: ObjectStore) -> "Registry":
    from kintsugi.registry import Registry

    return Registry(store)


def print_verdict(verdict: "Verdict") -> None:
    print_json(verdict.model_dump(mode="json"))


def show_verdict(verdict: "Verdict") -> None:
    if verdict.production is None:
        say(f"nothing to compare {verdict.candidate} with: it is the first behind this alias")
        return
    rows = [
        (
            bound.name,
            _decibel(bound.candidate, bound.candidate_category),
            _decibel(bound.production, bound.production_category),
            bound.change(),
            "yes" if bound.holds else "no",
        )
        for bound in verdict.bounds
    ]
    absent = [(name, "", "", "", f"unknown: {reason}") for name, reason in verdict.absent.items()]
    print_table(("bound", verdict.candidate, verdict.production, "difference", "holds"), rows + absent)


def _decibel(value: float, category: str | None) -> str:
    return f"{value:.2f} dB ({category})" if category else f"{value:.2f} dB"


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
