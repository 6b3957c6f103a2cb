"""From a checkpoint to an ONNX file that says what it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kintsugi import __version__
from kintsugi.checkpoint import load_checkpoint
from kintsugi.errors import ConfigError, KintsugiError
from kintsugi.export.graph import ExportSettings, Frame, Graph, Shape
from kintsugi.export.parity import check_parity
from kintsugi.models import RestorationUNet
from kintsugi.restore import Restorer, RestoreSettings
from kintsugi.restore.pooling import measure, watch
from kintsugi.storage import sha256, write_atomically

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class Exported:
    """A written graph.

    Attributes:
        inputs, outputs: shapes by name, of float32; a side that is free has a name in place of a number.
        operators: what a runtime must know, in alphabetical order.
        smallest_side: px that height and width must have at least.
        pools_over_input: the model takes statistics over all of its input: only up to the Restorer's window are the
            graph's answers the Restorer's.
        max_difference: the largest from the Restorer's answers, of full scale; None where onnxruntime is not installed.
    """

    path: Path
    sha256: str
    opset: int
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    operators: tuple[str, ...]
    smallest_side: int
    pools_over_input: bool
    max_difference: float | None


def export_model(folder: Path, path: Path, name: str, settings: ExportSettings | None = None) -> Exported:
    """Write the model of a checkpoint folder as an ONNX file, once its answers were found to be the Restorer's.

    The same checkpoint, settings and package versions give the same bytes.

    Args:
        path: an existing file is replaced.
        name: of the model, for the file's metadata.

    Raises:
        ConfigError: packages are missing, the settings do not fit the model, or the path cannot be written.
        IntegrityError: a file of the checkpoint differs from its manifest.
        KintsugiError: the model cannot be traced, or its graph answers otherwise than the Restorer; nothing is written.
    """
    settings = settings or ExportSettings()
    _check_path(path)
    _check_packages()
    checkpoint = load_checkpoint(folder)
    config = checkpoint.config.model
    if settings.mask and config.mask == "none":
        raise ConfigError("this model takes no mask (model.mask=none): leave --mask out")
    restorer = _restorer(folder, settings)
    pools = pools_over_input(restorer.model)
    graph = Graph(checkpoint, restorer.calibration.error_scale)
    frame = Frame(config, graph.network.stride, settings)
    model = frame.trace(graph)
    _check_operators(model)
    facts = {"model": name, "model_digest": checkpoint.digest, "pools_over_input": str(pools).lower()}
    _describe(model, {**facts, **_rules(frame)})
    data = model.SerializeToString(deterministic=True)
    difference = check_parity(data, restorer, frame.check_sizes(), masked=frame.masked)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}): choose another place") from error
    operators = tuple(sorted({node.op_type for node in model.graph.node}))
    places = frame.inputs, frame.outputs, operators, frame.smallest
    return Exported(path, sha256(data), settings.opset, *places, pools, difference)


def pools_over_input(model: RestorationUNet) -> bool:
    """Whether a model takes statistics over all that it is shown, told as the Restorer tells it."""
    watch(model)
    side = 2 * model.stride  # So large that nothing but such statistics is a single value.
    probe = torch.zeros(1, model.config.channels, side, side)
    with torch.inference_mode():
        return bool(measure([lambda: model(probe, probe[:, :1])]))


def _rules(frame: Frame) -> dict[str, str]:
    """What somebody who holds nothing but the file must know to use it."""
    without = {"none": "the model knows none", "predicted": "predicted", "optional": "taken as unknown"}
    size, smallest = frame.settings.size, frame.smallest
    return {
        "channels": str(frame.config.channels),
        "mask": "input: 1 on a known defect, else 0" if frame.masked else without[frame.config.mask],
        "not_in_the_graph": "tiling, alarm, retention, abstention",
        "opset": str(frame.settings.opset),
        "scaling": "image = value / white level (255, 4095, 65535, ...); value = round(restored * white level)",
        "size": f"{size[0]}x{size[1]} px" if size else f"any from {smallest}x{smallest} px on",
        "smallest_side": str(smallest),
        "window": str(RestoreSettings().window),
    }


def _describe(model: "ModelProto", facts: dict[str, str]) -> None:
    from onnx import helper

    model.producer_name, model.producer_version = "kintsugi", __version__
    model.doc_string = f"{facts['model']} restores degraded inspection images; metadata_props say how it is used"
    helper.set_model_props(model, dict(sorted({**facts, "kintsugi_version": __version__}.items())))


def _check_operators(model: "ModelProto") -> None:
    """ONNX' own checker, and that nothing is needed that only some runtimes know."""
    from onnx import checker, shape_inference

    try:
        checker.check_model(model, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise KintsugiError(
            f"the graph is not valid ONNX ({str(error).splitlines()[0]}): try another --opset, 18 for example"
        ) from error
    foreign = {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain}
    foreign |= {function.name for function in model.functions}
    if foreign:
        raise KintsugiError(
            f"this model needs operators that are not ONNX' own ({', '.join(sorted(foreign))}): "
            "serve it with 'kintsugi serve'"
        )


def _check_path(path: Path) -> None:
    if path.suffix != ".onnx":
        raise ConfigError(f"{path} must end in .onnx, by which runtimes know the format")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}: make it first, or choose another place")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: choose another name")


def _check_packages() -> None:
    try:
        import onnx
        import onnxscript
    except ImportError as error:
        raise ConfigError(
            f"to export, onnx and onnxscript are needed ({error}): pip install onnx onnxscript"
        ) from error
    del onnx, onnxscript


def _restorer(folder: Path, settings: ExportSettings) -> Restorer:
    """One that takes every image of the check in one piece, as the graph does, and leaves none alone."""
    whole = max(settings.size or (4096,))
    return Restorer.from_checkpoint(folder, settings=RestoreSettings(tile=whole, window=whole, abstain=False))
