"""kintsugi train."""

import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kintsugi import cluster
from kintsugi.commands.console import Json, Sets, note, print_json, say
from kintsugi.commands.evaluate import print_scorecard
from kintsugi.commands.lookup import fetch_model, open_root_store
from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.errors import ConfigError
from kintsugi.sections import Split
from kintsugi.storage import ObjectStore

if TYPE_CHECKING:
    from kintsugi.evaluation.scorecard import Scorecard
    from kintsugi.registry import ModelVersion


def train(
    config: Annotated[Path, typer.Argument(help="Experiment config, YAML.")],
    name: Annotated[str, typer.Option(help="Name to publish the best checkpoint under.")] = "unet",
    run: Annotated[str | None, typer.Option(help="Name of the run; an earlier one is continued.")] = None,
    init_from: Annotated[
        str | None, typer.Option(metavar="NAME[@ALIAS|@NUMBER]", help="Start from a published model's weights.")
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Train on the Ray cluster and publish the best checkpoint with its validation scorecard."""
    store = open_root_store()
    # Ray reads its token settings when it is imported: only now are they set.
    from kintsugi.training.launch import check_perceptual, launch_training

    settings = pin_dataset(store, load_config(config, sets or ()))
    check_perceptual(settings)
    init = None if init_from is None else initial_weights(store, init_from, settings)
    run = run or f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    cluster.connect()
    note(
        f"run {run}: {settings.train.workers} workers, {settings.train.epochs} epochs, dataset {settings.data.dataset}"
    )
    launch_training(settings, store.uri, run, init=init)
    version, card = publish_best(store, name, run)
    _tell_published(version, card, run, as_json)


def initial_weights(store: ObjectStore, model: str, config: ExperimentConfig) -> str:
    """Where the published model lies in the store.

    Raises:
        ConfigError: its weights are of another model than the config's.
    """
    from kintsugi.registry import Registry, version_key

    version = Registry(store).resolve(model)
    theirs = load_config(fetch_model(store, version.ref)[1] / "config.yaml").model
    if differ := config.model.other_weights(theirs):
        told = ", ".join(f"{key} (is {value} there)" for key, value in differ.items())
        raise ConfigError(f"--init-from {version.ref} is another model than the config's: set {told}")
    return version_key(version.name, version.number)


def pin_dataset(store: ObjectStore, config: ExperimentConfig) -> ExperimentConfig:
    """The config with its dataset named by digest, so that a run never changes data halfway.

    Raises:
        ConfigError: a crop is larger than the dataset's smallest image, and nobody allowed that.
    """
    from kintsugi.data.dataset import inspect_dataset

    summary = inspect_dataset(store, config.data.dataset)
    phases = [config, *(config.at_epoch(epoch) for epoch in range(config.train.epochs))]
    for data in (phase.data for phase in phases):
        if summary.smallest_side is not None and data.crop > summary.smallest_side and data.small_images == "refuse":
            raise ConfigError(
                f"data.crop is {data.crop} px and the smallest image of {summary.ref} {summary.smallest_side} px: set "
                f"data.crop={summary.smallest_side} or less, or data.small_images=mirror to fill it up at its border"
            )
    return with_values(config, {"data.dataset": f"{summary.name}@{summary.digest}"})


def publish_best(store: ObjectStore, name: str, run: str, split: Split = "val") -> "tuple[ModelVersion, Scorecard]":
    """Calibrate a run's best checkpoint on its validation images, score it on a whole split, publish it with that.

    Raises:
        DataError: its dataset has no images in that split; nothing is published.
    """
    from kintsugi.checkpoint import fetch_best
    from kintsugi.data.dataset import open_split
    from kintsugi.evaluation.calibration import calibrate_model
    from kintsugi.evaluation.scorecard import evaluate as score_images
    from kintsugi.registry import Registry
    from kintsugi.restore.restorer import Restorer
    from kintsugi.trust.report import save_calibration

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = fetch_best(store, run, folder).config
        reader, val, train = (open_split(store, config.data.dataset, part) for part in (split, "val", "train"))
        save_calibration(folder, calibrate_model(Restorer.from_checkpoint(folder), val, train, config))
        restorer = Restorer.from_checkpoint(folder)
        card = score_images(restorer, reader, config, dataset=config.data.dataset, split=split, model=name)
        version = Registry(store).publish(name, folder, card.model_dump_json().encode())
    return version, card


def _tell_published(version: "ModelVersion", card: "Scorecard", run: str, as_json: bool) -> None:
    if as_json:
        print_json({"model": version.ref, "digest": version.digest, "run": run, "score": card.score})
        return
    print_scorecard(card)
    say(f"published {version.ref}; 'kintsugi models promote {version.ref}' puts it into production")
