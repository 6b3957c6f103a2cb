"""kintsugi detector train."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from kintsugi.commands.console import Json, note, print_json, say
from kintsugi.commands.lookup import open_root_store
from kintsugi.errors import ConfigError

_TOO_POOR = 0.3


def train(
    dataset: Annotated[str, typer.Argument(metavar="NAME[@DIGEST]", help="Its clean images and masks are learned.")],
    folder: Annotated[Path, typer.Argument(help="Where the detector goes; 'kintsugi evaluate --detector' takes it.")],
    steps: Annotated[int, typer.Option(min=1, help="About 0.3 s each on one CPU core.")] = 5000,
    seed: Annotated[int, typer.Option(help="Of the weights and the crops.")] = 0,
    vary_grain: Annotated[
        bool, typer.Option("--vary-grain", help="Soften crops and add noise: less tied to one camera's grain.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a segmenter on a dataset's clean images; it judges how well defects are found before and after."""
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ConfigError(f"{folder} is not empty: choose another folder for the detector")
    from kintsugi.detection.detector import build_detector

    store = open_root_store()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=steps)
        card = build_detector(
            store, dataset, folder, steps=steps, seed=seed, vary_grain=vary_grain,
            progress=lambda step, _: bar.update(task, completed=step),
        )  # fmt: skip
    if as_json:
        print_json(card.model_dump())
        return
    found = {"val": card.val_average_precision, "test": card.test_average_precision}
    say(
        f"{folder}: average precision on clean images "
        + ", ".join(f"{value:.2f} ({split})" for split, value in found.items() if value is not None)
    )
    if (card.val_average_precision or 0) < _TOO_POOR:
        note("that is too poor to judge restorations by: train longer, or name your own detector")
