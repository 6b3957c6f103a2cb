"""The thin functions behind the command line: load, do, print what came of it."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Generator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from kintsugi import cluster, local
from kintsugi.config import ExperimentConfig, Split, load_config, with_values
from kintsugi.errors import ConfigError, ModelNotFound, StoreError
from kintsugi.storage import ObjectStore, open_store, store_uri_from_environment, write_atomically

if TYPE_CHECKING:
    from kintsugi.audit import Report
    from kintsugi.evaluation import Figure, Scorecard
    from kintsugi.registry import ModelVersion, Registry

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; repeatable.")
]
Model = Annotated[str, typer.Argument(metavar="NAME[@ALIAS|@NUMBER]", help="A published model.")]


def up(
    s3_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8333,
    dashboard_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8265,
    tensorboard_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 6006,
    ray_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 6379,
    endpoint_port: Annotated[int, typer.Option(help="Where 'kintsugi serve' will listen; 0 picks a free one.")] = 8000,
    cpus: Annotated[int | None, typer.Option(help="CPUs that Ray may use; default: all.")] = None,
) -> None:
    """Start the local stack: an S3 server, a Ray head with its dashboard, TensorBoard."""
    ports = local.Ports(
        s3=s3_port, dashboard=dashboard_port, tensorboard=tensorboard_port, gcs=ray_port, endpoint=endpoint_port
    )
    local.up(local.home_folder(), ports, cpus=cpus, progress=note)
    status()


def down() -> None:
    """Stop exactly what 'kintsugi up' started; the store's data stays."""
    stopped = local.down(local.home_folder(), progress=note)
    say(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


def status(as_json: Json = False) -> None:
    """Print every address of the local stack and what runs."""
    rows = local.status(local.home_folder())
    if as_json:
        print_json([{"name": name, "state": state, "address": address} for name, state, address in rows])
        return
    if not rows:
        say("no local stack is recorded here: 'kintsugi up' starts one")
        return
    print_table(("", "state", "address"), rows)


def data_build(
    layout: Annotated[str, typer.Argument(help="kla, magnetic-tile or pairs")],
    folder: Annotated[Path, typer.Argument(help="Where the images are.")],
    name: Annotated[str, typer.Option(help="Name of the dataset.")],
    part_pattern: Annotated[
        str | None, typer.Option(help="Regular expression whose first group in the sample's name is the part id.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build a dataset in the store from a folder of images."""
    from kintsugi.data.dataset import build_dataset

    report = build_dataset(layout, folder, name, open_root_store(), part_pattern=part_pattern)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    for pair in report.bad:
        note(f"set aside: {pair.name}: {pair.reason}")
    counts = ", ".join(f"{count} {split}" for split, count in report.counts.splits.items())
    verb = "was there already" if report.reused else "built"
    bad = f"{len(report.bad)} set aside"
    say(f"dataset {report.ref} {verb}: {report.samples} images of {report.parts} parts ({counts}), {bad}")


def data_inspect(
    name: Annotated[str, typer.Argument(metavar="NAME[@DIGEST]")],
    picture: Annotated[Path | None, typer.Option(help="Where to draw the contact sheet.")] = None,
    as_json: Json = False,
) -> None:
    """Count a dataset's images and draw a contact sheet."""
    from kintsugi.data.dataset import contact_sheet, inspect_dataset

    store = open_root_store()
    summary = inspect_dataset(store, name)
    sheet = contact_sheet(store, name, picture or Path(f"{name.partition('@')[0]}-contact-sheet.png"))
    if as_json:
        print_json({**summary.model_dump(mode="json"), "contact_sheet": str(sheet)})
        return
    groups = {"split": summary.counts.splits, "category": summary.counts.categories, "defect": summary.counts.defects}
    rows = [(kind, name, count) for kind, counts in groups.items() for name, count in counts.items()]
    print_table(("", "", "images"), rows)
    say(
        f"dataset {summary.ref}: {summary.samples} images of {summary.parts} parts, {summary.bad} set aside, "
        f"{summary.bytes / 1e6:.1f} MB, built from layout {summary.layout} at {summary.created}"
    )
    say(f"contact sheet: {sheet}")


def train(
    config: Annotated[Path, typer.Argument(help="Experiment config, YAML.")],
    name: Annotated[str, typer.Option(help="Name to publish the best checkpoint under.")] = "unet",
    run: Annotated[str | None, typer.Option(help="Name of the run; an earlier one is continued.")] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Train on the Ray cluster and publish the best checkpoint with its validation scorecard."""
    store = open_root_store()
    # Ray reads its token settings when it is imported: only now are they set.
    from kintsugi.training.launch import check_perceptual, launch_training

    settings = pin_dataset(store, load_config(config, sets or ()))
    check_perceptual(settings)
    run = run or f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    cluster.connect()
    note(
        f"run {run}: {settings.train.workers} workers, {settings.train.epochs} epochs, dataset {settings.data.dataset}"
    )
    launch_training(settings, store.uri, run)
    version, card = publish_best(store, name, run)
    _tell_published(version, card, run, as_json)


def evaluate(
    model: Model,
    dataset: Annotated[str | None, typer.Option(help="Default: the one it was trained on.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "val",
    output: Annotated[Path | None, typer.Option(help="Write the scorecard as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report for people, one HTML file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the worst images as PNG.")] = None,
    detector: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|PACKAGE.MODULE:NAME", help="Also measure how well it finds the defects."),
    ] = None,
    survival: Annotated[bool, typer.Option(help="Also plant small defects and measure what is kept of them.")] = False,
    give_mask: Annotated[bool, typer.Option(help="Show the true defect mask to the model.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images.")] = None,
    as_json: Json = False,
) -> None:
    """Score a published model on a dataset: degraded against restored."""
    from kintsugi.data.dataset import open_split
    from kintsugi.detection import load_detector
    from kintsugi.evaluation import draw, planted_survival
    from kintsugi.evaluation import evaluate as score_images
    from kintsugi.evaluation_report import write_report
    from kintsugi.restore import Restorer

    store = open_root_store()
    version, folder = _fetch(store, model)
    settings = load_config(folder / "config.yaml")
    reference, part = dataset or settings.data.dataset, _split(split)
    reader = open_split(store, reference, part)
    finder = load_detector(detector) if detector else None
    restorer = Restorer.from_checkpoint(folder)
    card = score_images(
        restorer, reader, settings, dataset=reference, split=part, model=version.ref,
        give_mask=give_mask, limit=limit, detector=finder,
    )  # fmt: skip
    if survival:
        card = card.model_copy(update={"survival": planted_survival(restorer, reader, settings, limit=limit)})
    if output is not None:
        write_atomically(output, card.model_dump_json(indent=1).encode())
    if picture is not None:
        draw(restorer, reader, settings, card, picture, give_mask=give_mask)
    if report is not None:
        write_report(card, restorer, reader, settings, report, give_mask=give_mask)
    if as_json:
        print_json(card.model_dump(mode="json", exclude={"images"}))
        return
    print_scorecard(card)


def models_list(as_json: Json = False) -> None:
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


def models_show(model: Model, as_json: Json = False) -> None:
    """Show one version: scores, alias history, config."""
    store = open_root_store()
    version, folder = _fetch(store, model)
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


def models_promote(
    model: Model, alias: Annotated[str, typer.Option(help="Which alias to move.")] = "production"
) -> None:
    """Point an alias at a version."""
    version = _registry(open_root_store()).promote(model, alias)
    say(f"{version.name}@{alias} is now version {version.number} ({version.digest[:12]})")


def models_rollback(
    name: Annotated[str, typer.Argument()],
    alias: Annotated[str, typer.Option(help="Which alias to move.")] = "production",
) -> None:
    """Take back the last promotion."""
    version = _registry(open_root_store()).rollback(name, alias)
    say(f"{version.name}@{alias} is back at version {version.number} ({version.digest[:12]})")


def restore(
    image: Annotated[Path, typer.Argument(help="PNG, TIFF, JPEG or BMP; grey or RGB, 8 or 16 bit.")],
    output: Annotated[Path, typer.Argument(help="Where the restored image goes, in the same format.")],
    model: Annotated[
        str | None,
        typer.Option(help="A checkpoint folder or a published model, as unet@production; default: the shipped one."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Known defects: every value but 0.")] = None,
    white_level: Annotated[int | None, typer.Option(help="Full scale, for example 4095 for 12 bit in 16.")] = None,
    defect_map: Annotated[
        Path | None, typer.Option(help="Write where the model sees defects, as PNG or TIFF of 8 bits.")
    ] = None,
    ensemble: Annotated[str, typer.Option(help="none, flips (4 passes) or dihedral (8).")] = "none",
    tile: Annotated[int, typer.Option(help="Side of a tile, px; changes memory and time, not the result.")] = 512,
    force: Annotated[bool, typer.Option(help="Replace existing outputs.")] = False,
    as_json: Json = False,
) -> None:
    """Restore one image on this machine; a large TIFF passes in strips."""
    for path in (output, defect_map):
        if path is not None and path.exists() and not force:
            raise ConfigError(f"{path} exists: choose another name, or add --force to replace it")
    from kintsugi.files import restore_file
    from kintsugi.restore import Restorer, RestoreSettings

    label, digest, folder = _find_model(model)
    settings = RestoreSettings(tile=tile, ensemble=cast(Any, ensemble))
    restorer = Restorer.from_checkpoint(folder, settings=settings)
    with _row_progress() as progress:
        report = restore_file(
            restorer, image, output, mask=mask, white_level=white_level, defect_map=defect_map, progress=progress
        )
    if as_json:
        print_json({"model": label, "digest": digest, **report.to_dict()})
        return
    say(f"{output}: {label}, {_in_words(report)}")


def _find_model(model: str | None) -> tuple[str, str, Path]:
    """Name, digest and checkpoint folder of a folder, of a published model, or of the shipped weights."""
    from kintsugi.checkpoint import load_checkpoint
    from kintsugi.restore import shipped_weights

    folder = shipped_weights() if model is None else Path(model)
    if folder.is_dir():
        return folder.name if model is None else str(folder), load_checkpoint(folder).digest, folder
    assert model is not None
    try:
        version, folder = _fetch(open_root_store(), model)
    except (ConfigError, ModelNotFound, StoreError) as error:
        raise ModelNotFound(
            f"--model {model} is no checkpoint folder, and no published model either: {error}"
        ) from error
    return version.ref, version.digest, folder


def _in_words(report: "Report") -> str:
    if report.abstained:
        return f"left as it was: {report.abstained}"
    kept = f"structure kept {report.retention:.2f}"
    return f"{kept}  ALARM: {'; '.join(report.reasons)}: look at this image" if report.alarm else kept


@contextlib.contextmanager
def _row_progress() -> Generator[Callable[[int, int], None]]:
    """A bar on the terminal, from the first call on."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("restoring", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def pin_dataset(store: ObjectStore, config: ExperimentConfig) -> ExperimentConfig:
    """The config with its dataset named by digest, so that a run never changes data halfway."""
    from kintsugi.data.dataset import resolve_dataset

    name = config.data.dataset.partition("@")[0]
    _, manifest = resolve_dataset(store, config.data.dataset)
    return with_values(config, {"data.dataset": f"{name}@{manifest.digest}"})


def publish_best(store: ObjectStore, name: str, run: str) -> "tuple[ModelVersion, Scorecard]":
    """Calibrate a run's best checkpoint, score it on its whole validation split and publish it with the scorecard."""
    from kintsugi.audit import save_calibration
    from kintsugi.calibration import calibrate_model
    from kintsugi.checkpoint import fetch_best
    from kintsugi.data.dataset import open_split
    from kintsugi.evaluation import evaluate as score_images
    from kintsugi.registry import Registry
    from kintsugi.restore import Restorer

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = fetch_best(store, run, folder).config
        reader, train = (open_split(store, config.data.dataset, split) for split in ("val", "train"))
        save_calibration(folder, calibrate_model(Restorer.from_checkpoint(folder), reader, train, config))
        restorer = Restorer.from_checkpoint(folder)
        card = score_images(restorer, reader, config, dataset=config.data.dataset, split="val", model=name)
        version = Registry(store).publish(name, folder, card.model_dump_json().encode())
    return version, card


def print_scorecard(card: "Scorecard") -> None:
    """The figures that people compare, overall and by category: as they are, and after one intensity fit."""
    from kintsugi.evaluation import SHOWN

    for prefix, title in (("", "as they are"), ("aligned_", "after one global intensity fit")):
        names = [f"{prefix}{name}" for name in SHOWN]
        rows = [
            (group, *(_change(figures.get(name)) for name in names))
            for group, figures in {"all": card.overall, **card.by_category}.items()
        ]
        note(f"{card.model} on {card.dataset.partition('@')[0]}/{card.split}, {len(card.images)} images, {title}:")
        print_table(("", "PSNR, dB", "SSIM", "defect PSNR, dB", "defect SSIM"), rows)
    kept, invented = (card.overall.get(name) for name in ("contrast_kept", "background_invented"))
    if kept and invented:
        say(f"defect contrast kept {_change(kept)} at background invented {_change(invented, '.2%')}")
    if (found := card.detectability) and found.recovered is not None:
        say(f"detectability recovered {found.recovered:.0%}")
    if found and found.restored_rise is not None:
        say(f"defect-free images with new false alarms {found.restored_rise:.1%}")
    say(f"score {card.score:+.2f} dB: the smaller of the aligned gains in PSNR and in defect PSNR")


def _change(figure: "Figure | None", form: str = ".2f") -> str:
    return f"{figure.degraded:{form}} → {figure.restored:{form}}" if figure else ""


def _tell_published(version: "ModelVersion", card: "Scorecard", run: str, as_json: bool) -> None:
    if as_json:
        print_json({"model": version.ref, "digest": version.digest, "run": run, "score": card.score})
        return
    print_scorecard(card)
    say(f"published {version.ref}; 'kintsugi models promote {version.ref}' puts it into production")


def open_root_store() -> ObjectStore:
    """The store that KINTSUGI_STORE names, else the local stack's."""
    local.activate(local.home_folder())
    return open_store(store_uri_from_environment())


def _registry(store: ObjectStore) -> "Registry":
    from kintsugi.registry import Registry

    return Registry(store)


def _fetch(store: ObjectStore, model: str) -> "tuple[ModelVersion, Path]":
    registry = _registry(store)
    version = registry.resolve(model)
    return version, registry.fetch(version)


def _split(text: str) -> Split:
    if text not in ("train", "val", "test"):
        raise ConfigError(f"--split {text}: choose train, val or test")
    return text


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def say(text: str) -> None:
    """A result, on standard output."""
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def note(text: str) -> None:
    """Progress, on standard error."""
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)


def print_json(document: Any) -> None:
    """One document on one line, the last of standard output."""
    sys.stdout.write(json.dumps(document) + "\n")


def print_table(columns: tuple[str, ...], rows: Any) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
