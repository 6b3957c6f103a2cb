"""kintsugi export."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kintsugi.commands.console import Json, note, print_json, say
from kintsugi.commands.lookup import find_model
from kintsugi.errors import ConfigError

if TYPE_CHECKING:
    from kintsugi.export import Exported, Side

SHIPPED = "shipped"


def export(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint folder, a published model, as unet@production, or 'shipped': our weights."),
    ],
    output: Annotated[Path, typer.Argument(help="Where the graph goes; ends in .onnx.")],
    opset: Annotated[int, typer.Option(help="Version of ONNX' operators, 17 to 23.")] = 18,
    mask: Annotated[bool, typer.Option("--mask", help="Take the known defects as a second input.")] = False,
    size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Take images of this size only, for runtimes that need it fixed."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model as one ONNX file, checked against our own answers: docs/export.md."""
    sides = None if size is None else _sides(size)
    if output.exists() and not force:
        raise ConfigError(f"{output} exists: choose another name, or add --force to replace it")
    from kintsugi.export import ExportSettings, export_model

    settings = ExportSettings(opset=opset, mask=mask, size=sides)
    label, digest, folder = find_model(None if model == SHIPPED else model)
    if not as_json:
        note(f"exporting {label}")
    done = export_model(folder, output, Path(label).name, settings)
    if as_json:
        print_json({"model": label, "digest": digest, **asdict(done), "path": str(done.path)})
        return
    say(f"{output}: {label}, opset {opset}, sha256 {done.sha256}")
    for name, shape in (done.inputs | done.outputs).items():
        say(f"  {'in ' if name in done.inputs else 'out'} {name}: {_shape(shape)}")
    for line in _remarks(done):
        say(line)


def _remarks(done: "Exported") -> list[str]:
    from kintsugi.restore import RestoreSettings

    window = RestoreSettings().window
    lines: list[str] = []
    if "height" in done.inputs["image"]:
        lines.append(f"height and width: any from {done.smallest_side} px on")
    if done.pools_over_input:
        lines.append(
            f"this model pools over its whole input: of images above {window} x {window} px the graph's answers are "
            "not those of 'kintsugi restore'"
        )
    if done.max_difference is None:
        lines.append("not compared with 'kintsugi restore': pip install onnxruntime, then export again")
    else:
        lines.append(f"largest difference from 'kintsugi restore': {done.max_difference:.1e} of full scale")
    return lines


def _shape(shape: "tuple[Side, ...]") -> str:
    return f"float32 ({', '.join(map(str, shape))})"


def _sides(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise ConfigError(f"--size {text}: give height and width in px, for example 512x640")
    return int(found[1]), int(found[2])
