"""kintsugi restore."""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from kintsugi.commands.console import Json, print_json, say
from kintsugi.commands.lookup import find_model
from kintsugi.errors import ConfigError

if TYPE_CHECKING:
    from kintsugi.trust.report import Report


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
    error_map: Annotated[
        Path | None,
        typer.Option(help="Write the bound of the error at each pixel, as PNG or TIFF of 16 bits of full scale."),
    ] = None,
    ensemble: Annotated[str, typer.Option(help="none, flips (4 passes) or dihedral (8).")] = "none",
    tile: Annotated[int, typer.Option(help="Side of a tile, px; changes memory and time, not the result.")] = 512,
    force: Annotated[bool, typer.Option(help="Replace existing outputs.")] = False,
    as_json: Json = False,
) -> None:
    """Restore one image on this machine; a large TIFF passes in strips."""
    for path in (output, defect_map, error_map):
        if path is not None and path.exists() and not force:
            raise ConfigError(f"{path} exists: choose another name, or add --force to replace it")
    from kintsugi.restore.files import MapName, restore_file
    from kintsugi.restore.restorer import Restorer, RestoreSettings

    label, digest, folder = find_model(model)
    settings = RestoreSettings(tile=tile, ensemble=cast(Any, ensemble))
    restorer = Restorer.from_checkpoint(folder, settings=settings)
    wanted: dict[MapName, Path | None] = {"defect_map": defect_map, "error_bound": error_map}
    maps: dict[MapName, Path] = {name: path for name, path in wanted.items() if path is not None}
    with _row_progress() as progress:
        report = restore_file(restorer, image, output, mask=mask, white_level=white_level, maps=maps, progress=progress)
    if as_json:
        print_json({"model": label, "digest": digest, **report.to_dict()})
        return
    say(f"{output}: {label}, {_in_words(report)}")


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
