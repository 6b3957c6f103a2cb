"""kintsugi evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kintsugi.commands.console import Json, note, print_json, print_table, say
from kintsugi.commands.lookup import find_model, open_root_store
from kintsugi.config import load_config
from kintsugi.errors import ConfigError
from kintsugi.sections import Split
from kintsugi.storage import write_atomically

if TYPE_CHECKING:
    from kintsugi.evaluation.scorecard import Figure, Scorecard


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="NAME[@ALIAS|@NUMBER]|FOLDER", help="A published model or a checkpoint folder.")
    ],
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
    """Score a model on a dataset: degraded against restored."""
    from kintsugi.data.dataset import open_split
    from kintsugi.detection.detector import load_detector
    from kintsugi.evaluation.report import write_report
    from kintsugi.evaluation.scorecard import draw, planted_survival
    from kintsugi.evaluation.scorecard import evaluate as score_images
    from kintsugi.restore.restorer import Restorer

    store = open_root_store()
    label, _, folder = find_model(model)
    settings = load_config(folder / "config.yaml")
    reference, part = dataset or settings.data.dataset, _split(split)
    reader = open_split(store, reference, part)
    finder = load_detector(detector) if detector else None
    restorer = Restorer.from_checkpoint(folder)
    card = score_images(
        restorer, reader, settings, dataset=reference, split=part, model=label,
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


def print_scorecard(card: "Scorecard") -> None:
    """The figures that people compare, overall and by category: as they are, and after one intensity fit."""
    from kintsugi.evaluation.scorecard import SHOWN

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


def _split(text: str) -> Split:
    if text not in ("train", "val", "test"):
        raise ConfigError(f"--split {text}: choose train, val or test")
    return text
