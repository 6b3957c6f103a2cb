"""kintsugi data build, data inspect."""

from pathlib import Path
from typing import Annotated

import typer

from kintsugi.commands.console import Json, note, print_json, print_table, say
from kintsugi.commands.lookup import open_root_store


def build(
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


def inspect(
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
