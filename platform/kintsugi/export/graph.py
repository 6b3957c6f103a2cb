"""The graph: the network, traced, and a frame of our own that lets it take images of any size.

The network is traced for sides that are multiples of its stride, which leaves hardly any arithmetic on shapes in it.
The frame fills sides up before it and cuts them back after it, in a few operators that every runtime knows.
"""

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kintsugi.checkpoint import Checkpoint, load_weights
from kintsugi.errors import ConfigError, KintsugiError
from kintsugi.models import RestorationUNet
from kintsugi.sections import ModelConfig

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

OPSETS = range(17, 24)
_NATIVE = 18  # The oldest opset that the exporter writes by itself.
_TEXTS = {
    "image": "0 is black, 1 is the white level; RGB where there are 3 channels",
    "mask": "1 on a known defect, else 0",
    "restored": "as the input, within 0 and 1",
    "defect_map": "probability of a defect",
    "error_bound": "bound of the absolute error of restored, calibrated",
}
Side = int | str
Shape = tuple[Side, ...]


@dataclass(frozen=True)
class ExportSettings:
    """What graph is made of a model.

    Attributes:
        opset: version of ONNX' operators.
        mask: take the known defects as a second input. A model with `mask: given` always does.
        size: (height, width) of the only images that the graph takes; by default any from the model's stride on.
    """

    opset: int = _NATIVE
    mask: bool = False
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ConfigError(f"the opset must be one of {OPSETS[0]} to {OPSETS[-1]} (got {self.opset})")
        if self.size is not None and min(self.size) < 1:
            raise ConfigError(f"height and width must be at least 1 px (got {self.size[0]}x{self.size[1]})")


class _Unpadded(RestorationUNet):
    """A network whose input is filled up already."""

    def _pad(self, batch: Tensor) -> Tensor:
        return batch


class Graph(nn.Module):
    """What is traced: the network, and what the Restorer makes of its answers before it rounds them."""

    def __init__(self, checkpoint: Checkpoint, error_scale: float) -> None:
        super().__init__()
        self.network = _Unpadded(checkpoint.config.model)
        load_weights(self.network, checkpoint)
        self.error_scale = error_scale
        self.eval()

    def forward(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        optional = self.network.config.mask == "optional"
        # One value for all, so that the size of the batch does not come into the graph.
        known = torch.zeros(1) if mask is None else torch.ones(1)
        if mask is None:
            mask = torch.zeros_like(image[:, :1]) if optional else torch.zeros(1, 1, 1, 1)
        answer = self.network(image, mask, known)
        chance = None if answer.defect is None else torch.sigmoid(answer.defect)
        bound = None if answer.error is None else answer.error * self.error_scale
        return tuple(part for part in (answer.image.clamp(0, 1), chance, bound) if part is not None)


@dataclass(frozen=True)
class Frame:
    """The outside of a graph: its inputs and outputs, and the nodes that fill sides up and cut them back."""

    config: ModelConfig
    stride: int
    settings: ExportSettings

    @property
    def inputs(self) -> dict[str, Shape]:
        image = {"image": self._shape(self.config.channels)}
        return {**image, "mask": self._shape(1)} if self.masked else image

    @property
    def outputs(self) -> dict[str, Shape]:
        found = {"restored": self._shape(self.config.channels)}
        if self.config.mask == "predicted":
            found["defect_map"] = self._shape(1)
        return {**found, "error_bound": self._shape(1)} if self.config.error else found

    @property
    def masked(self) -> bool:
        return self.settings.mask or self.config.mask == "given"

    @property
    def smallest(self) -> int:
        """px that sides must have at least."""
        return 1 if self.settings.size else self.stride

    def check_sizes(self) -> list[tuple[int, int]]:
        """The smallest image, and one of several strides and odd sides."""
        side = self.stride
        return [self.settings.size] if self.settings.size else [(side, side + 1), (2 * side + 5, 3 * side - 1)]

    def trace(self, graph: Graph) -> "ModelProto":
        """The whole model.

        Raises:
            KintsugiError: parts of it, for example of its timm encoder, have no counterpart in ONNX.
        """
        from onnx import helper

        core = _lowered(self._trace_core(graph), self.settings.opset)
        constants: dict[str, list[int]] = {}
        before, after = ([], []) if self._fits else (list(self._fill(constants)), list(self._cut(constants)))
        whole = helper.make_graph(
            [*before, *(_bare(node) for node in core.graph.node), *after],
            "kintsugi",
            [_value(name, shape) for name, shape in self.inputs.items()],
            [_value(name, shape) for name, shape in self.outputs.items()],
            [*core.graph.initializer, *(_integers(name, values) for name, values in constants.items())],
        )
        return helper.make_model(
            whole, opset_imports=core.opset_import, ir_version=core.ir_version, functions=core.functions
        )

    def _trace_core(self, graph: Graph) -> "ModelProto":
        """The network for sides that are multiples of its stride."""
        dim = torch.export.Dim
        free: dict[int, Any] = {0: dim("batch")}
        sides = tuple(-(-side // self.stride) * self.stride for side in self.settings.size or ())
        if not sides:
            sides = 2 * self.stride, 3 * self.stride
            free |= {2: self.stride * dim("rows"), 3: self.stride * dim("columns")}
        examples = tuple(torch.zeros(2, cast(int, shape[1]), *sides) for shape in self.inputs.values())
        try:
            with _quiet():
                program = torch.onnx.export(
                    graph,
                    examples,
                    input_names=[self._inner(name) for name in self.inputs],
                    output_names=[self._inner(name) for name in self.outputs],
                    dynamic_shapes=(free,) * len(examples),
                    opset_version=max(self.settings.opset, _NATIVE),
                    custom_translation_table=_translations(),
                    dynamo=True,
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            raise KintsugiError(
                f"this model cannot be written as ONNX ({str(error).splitlines()[0]}): serve it with 'kintsugi serve'"
            ) from error
        assert program is not None
        return program.model_proto

    @property
    def _fits(self) -> bool:
        """Images fall on the stride as they are."""
        return self.settings.size is not None and not any(side % self.stride for side in self.settings.size)

    def _inner(self, name: str) -> str:
        """What an input or output is called within the frame."""
        return name if self._fits else f"whole_{name}"

    def _shape(self, channels: int) -> Shape:
        return ("batch", channels, *(self.settings.size or ("height", "width")))

    def _fill(self, constants: dict[str, list[int]]) -> "Iterator[NodeProto]":
        """Mirror images at the bottom and on the right up to a multiple of the stride, as the model itself does."""
        constants |= {"frame_origin": [0, 0], "frame_axes": [2, 3]}
        if self.settings.size is not None:
            height, width = self.settings.size
            bottom, right = -height % self.stride, -width % self.stride
            constants |= {"frame_pads": [0] * 6 + [bottom, right], "frame_size": [height, width]}
            mode = "reflect" if bottom < height and right < width else "edge"
            for name in self.inputs:
                yield _node("Pad", [name, "frame_pads"], self._inner(name), mode=mode)
            return
        # Always by the same amount, then cut: constant pads are what importers like.
        constants |= {"frame_pads": [0] * 6 + [self.stride - 1] * 2, "frame_more": [self.stride - 1]}
        constants |= {"frame_stride": [self.stride], "frame_2": [2], "frame_4": [4], "frame_0": [0]}
        yield _node("Shape", ["image"], "frame_shape")
        yield _node("Slice", ["frame_shape", "frame_2", "frame_4", "frame_0"], "frame_size")
        yield _node("Add", ["frame_size", "frame_more"], "frame_reach")
        yield _node("Div", ["frame_reach", "frame_stride"], "frame_strides")
        yield _node("Mul", ["frame_strides", "frame_stride"], "frame_whole")
        for name in self.inputs:
            yield _node("Pad", [name, "frame_pads"], f"filled_{name}", mode="reflect")
            yield _node("Slice", [f"filled_{name}", "frame_origin", "frame_whole", "frame_axes"], self._inner(name))

    def _cut(self, constants: dict[str, list[int]]) -> "Iterator[NodeProto]":
        for name in self.outputs:
            yield _node("Slice", [self._inner(name), "frame_origin", "frame_size", "frame_axes"], name)


@contextmanager
def _quiet() -> Generator[None]:
    """Without the remark that two inputs have the same free sides, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*axis name.*", category=UserWarning)
        yield


def _lowered(core: "ModelProto", opset: int) -> "ModelProto":
    """The same in opset 17, where axes of reductions are attributes; onnx' own converter leaves some of it undone.

    What else changed in 18, the checker finds.
    """
    from onnx import helper, numpy_helper

    if opset >= _NATIVE:
        return core
    known = {part.name: part for part in core.graph.initializer}
    later = {"noop_with_empty_axes", "num_outputs", "antialias", "keep_aspect_ratio_policy"}
    for node in core.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name not in later]
        if node.op_type in ("ReduceMean", "ReduceMax"):
            kept.append(helper.make_attribute("axes", numpy_helper.to_array(known[node.input.pop()]).tolist()))
        del node.attribute[:]
        node.attribute.extend(kept)
    used = {name for node in core.graph.node for name in node.input}
    for name in known.keys() - used:
        core.graph.initializer.remove(known[name])
    core.opset_import[0].version = opset
    return core


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Folding pixels into channels and back as one operator each, and as none with a stem of 1.

    PixelUnshuffle becomes a strided convolution that picks each pixel once. The exporter's own way, Reshape and
    Transpose over six axes, brings arithmetic on shapes with it; SpaceToDepth orders channels otherwise, and OpenVINO
    2026.4 loses a Gather that puts them right.
    """
    import onnxscript
    from onnx import numpy_helper

    # Its own types cannot say that an answer may be given on.
    op: Any = onnxscript.opset18

    def unshuffle(image: Any, downscale_factor: int) -> Any:
        if downscale_factor == 1:
            return op.Identity(image)
        taps, channels = downscale_factor**2, int(image.shape[1])
        picks = np.eye(channels * taps, dtype=np.float32).reshape(-1, channels, downscale_factor, downscale_factor)
        kernel = op.Constant(value=numpy_helper.from_array(picks))
        return op.Conv(image, kernel, strides=[downscale_factor, downscale_factor])

    def shuffle(image: Any, upscale_factor: int) -> Any:
        if upscale_factor == 1:
            return op.Identity(image)
        return op.DepthToSpace(image, blocksize=upscale_factor, mode="CRD")

    aten = torch.ops.aten
    return {aten.pixel_unshuffle.default: unshuffle, aten.pixel_shuffle.default: shuffle}


def _value(name: str, shape: Shape) -> "ValueInfoProto":
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape, _TEXTS[name])


def _node(kind: str, inputs: list[str], output: str, **attributes: Any) -> "NodeProto":
    from onnx import helper

    return helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes)


def _bare(node: "NodeProto") -> "NodeProto":
    """Without the traces of the source, which name the places of files on the exporting machine."""
    del node.metadata_props[:]
    node.doc_string = ""
    return node


def _integers(name: str, values: list[int]) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(values, np.int64), name)
