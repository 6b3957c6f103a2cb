"""Exported graphs in onnxruntime against the Restorer; tests/platform/test_export_command.py has the verb."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from kintsugi import export
from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import load_config, parse_config
from kintsugi.errors import ConfigError, KintsugiError
from kintsugi.export import Exported, ExportSettings, export_model, pools_over_input
from kintsugi.imaging import Image
from kintsugi.models import RestorationUNet, build_model
from kintsugi.restore import Restorer, RestoreSettings
from kintsugi.sections import ModelConfig
from kintsugi.trust.report import Calibration, save_calibration

SIZES = ((37, 53), (64, 64), (101, 200))
TINY: dict[str, Any] = {"channels": 1, "base": 8, "levels": 1, "reduction": 4, "mask": "none", "attention": "none"}
CONFIGS = sorted((Path(__file__).parents[2] / "platform/configs").glob("*.yaml"))
BLIND, MASKED = ExportSettings(), ExportSettings(mask=True)


def shrunk(path: Path) -> dict[str, Any]:
    """The config's model with one narrow level."""
    found = load_config(path).model
    lists = {"blocks": 1, "skips": found.skips[:1], "reduction": 4}
    return {**found.model_dump(), "levels": 1, "base": 8, "max_channels": None, **lists}


VARIANTS: dict[str, tuple[dict[str, Any], ExportSettings]] = {
    **{path.stem: (shrunk(path), BLIND) for path in CONFIGS},
    "light, masked": (shrunk(CONFIGS[0].with_name("light.yaml")), MASKED),
    "demo, masked": (shrunk(CONFIGS[0].with_name("demo.yaml")), MASKED),
    "naf": (
        {**TINY, "channels": 3, "stem": 2, "block": "naf", "attention": "channel_spatial", "skips": "gated"},
        BLIND,
    ),
    "group": ({**TINY, "norm": "group", "stem": 4}, BLIND),
    "timm": ({**TINY, "encoder": "resnet18", "mask": "predicted", "residual": True}, BLIND),
}
POOLING = {"seed", "demo", "demo, masked", "naf", "group"}


@dataclass
class Case:
    folder: Path
    settings: ExportSettings
    done: Exported

    def restorer(self, **settings: Any) -> Restorer:
        return Restorer.from_checkpoint(self.folder, settings=RestoreSettings(abstain=False, **settings))

    def session(self) -> Any:
        return onnxruntime.InferenceSession(self.done.path, providers=["CPUExecutionProvider"])


def checkpoint(folder: Path, model: dict[str, Any], seed: int = 0) -> Path:
    """Weights that change the input, and a calibration that scales the bound."""
    loss = {"mask": 0.1 * (model["mask"] == "predicted"), "error": 0.1 * bool(model.get("error"))}
    config = parse_config({"model": model, "loss": loss})
    torch.manual_seed(seed)
    network = build_model(config.model)
    for head in (network.background_head, getattr(network, "defect_head", None)):
        if head is not None:
            torch.nn.init.normal_(head.weight, std=0.05)
    save_checkpoint(folder, network, config, {"score": 1.0}, {})
    save_calibration(folder, Calibration(error_scale=1.5))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Each variant, exported once; shrunk, light.yaml and best.yaml are one."""
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        model, settings = VARIANTS[name]
        key = repr(VARIANTS[name])
        if key not in cases:
            folder = checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", model)
            cases[key] = Case(folder, settings, export_model(folder, folder.parent / "model.onnx", "unet@3", settings))
        return cases[key]

    return get


def picture(size: tuple[int, int], channels: int, seed: int = 0) -> Image:
    shape = size if channels == 1 else (*size, channels)
    return Image(np.random.default_rng(seed).integers(9000, 56000, shape).astype(np.uint16), "png", 65535)


def planes(part: Any) -> np.ndarray:
    return part[None] if part.ndim == 2 else part.transpose(2, 0, 1)


def assert_as_the_restorer(case: Case, session: Any, size: tuple[int, int], batch: int) -> None:
    restorer = case.restorer()
    images = [picture(size, restorer.model.config.channels, seed) for seed in range(batch)]
    masks = [np.indices(size).sum(0) % (9 + seed) < 4 for seed in range(batch)]
    masked = "mask" in case.done.inputs
    feeds = {"image": np.stack([planes(image.to_unit()) for image in images])}
    if masked:
        feeds["mask"] = np.stack([planes(mask.astype(np.float32)) for mask in masks])
    answers = dict(zip(case.done.outputs, session.run(list(case.done.outputs), feeds), strict=True))
    for index, image in enumerate(images):
        wanted = restorer.restore(image, masks[index] if masked else None)
        assert np.abs(wanted.image.to_unit() - image.to_unit()).max() > 0.01
        np.testing.assert_allclose(answers["restored"][index], planes(wanted.image.to_unit()), rtol=0, atol=1e-4)
        for name, part in (("defect_map", wanted.defect_map), ("error_bound", wanted.error_bound)):
            assert (name in answers) == (part is not None)
            if part is not None:
                np.testing.assert_allclose(answers[name][index], planes(part), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_graph_answers_images_of_any_size_as_the_restorer(exported: Callable[[str], Case], name: str) -> None:
    case = exported(name)
    session = case.session()
    for batch, size in zip((1, 2, 1), SIZES, strict=True):
        assert_as_the_restorer(case, session, size, batch)
    assert case.done.max_difference is not None and 0 < case.done.max_difference <= 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_the_graph_is_valid_and_has_only_operators_of_onnx_itself(exported: Callable[[str], Case], name: str) -> None:
    case = exported(name)
    model = onnx.load(case.done.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not model.functions and {node.domain for node in model.graph.node} == {""}
    assert set(case.done.operators) == {node.op_type for node in model.graph.node}


def test_the_operators_are_those_that_are_documented(exported: Callable[[str], Case], repository: Path) -> None:
    section = (repository / "docs/export.md").read_text().split("## Operators")[1].split("The network itself")[0]
    found = {operator for name in VARIANTS for operator in exported(name).done.operators}
    assert found == set(re.findall(r"`(\w+)`", section))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_graph_says_whether_the_model_pools_over_its_whole_input(
    exported: Callable[[str], Case], name: str
) -> None:
    assert exported(name).done.pools_over_input == (name in POOLING)


def test_what_is_documented_of_the_configs_is_so() -> None:
    pooling = {path.stem: pools_over_input(RestorationUNet(narrow(path))) for path in CONFIGS}
    assert pooling == {"best": False, "demo": True, "light": False, "seed": True}


def narrow(path: Path) -> ModelConfig:
    return load_config(path).model.model_copy(update={"base": 8, "max_channels": 8})


def test_the_file_says_what_it_is_and_nothing_of_the_machine(exported: Callable[[str], Case]) -> None:
    case = exported("light")
    model = onnx.load(case.done.path)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["model"] == "unet@3" and re.fullmatch(r"[0-9a-f]{64}", told["model_digest"])
    assert (told["smallest_side"], told["window"], told["opset"]) == ("32", "512", "18")
    assert (told["channels"], told["mask"], told["pools_over_input"]) == ("1", "predicted", "false")
    assert "white level" in told["scaling"] and "alarm" in told["not_in_the_graph"]
    assert model.producer_name == "kintsugi" and model.doc_string
    assert all(place.doc_string for place in (*model.graph.input, *model.graph.output))
    assert str(Path(export.__file__).parents[2]).encode() not in case.done.path.read_bytes()
    free = ("batch", 1, "height", "width")
    assert case.done.inputs == {"image": free}
    assert case.done.outputs == {"restored": free, "defect_map": free, "error_bound": free}


def test_of_an_image_of_many_tiles_the_graph_is_within_a_level(exported: Callable[[str], Case]) -> None:
    case = exported("light")
    image = picture((330, 290), 1)
    wanted = case.restorer(tile=128, window=128).restore(image).image.to_unit()
    found = case.session().run(["restored"], {"image": image.to_unit()[None, None]})[0]
    assert np.abs(found[0, 0] - wanted).max() <= 1 / 255


def test_an_image_below_the_smallest_side_is_refused(exported: Callable[[str], Case]) -> None:
    case = exported("light")
    assert case.done.smallest_side == 32
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        case.session().run(None, {"image": np.zeros((1, 1, 31, 64), np.float32)})


@pytest.mark.parametrize("size", [(64, 32), (40, 51), (3, 70)])
def test_a_graph_of_one_size_answers_as_the_restorer_and_has_no_arithmetic_on_shapes(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    settings = ExportSettings(size=size)
    folder = checkpoint(tmp_path / "checkpoint", {**TINY, "stem": 4})
    case = Case(folder, settings, export_model(folder, tmp_path / "model.onnx", "unet", settings))
    assert_as_the_restorer(case, case.session(), size, 2)
    assert case.done.inputs == {"image": ("batch", 1, *size)}
    frame = {"Shape", "Pad", "Slice"} & set(case.done.operators)
    assert frame == (set() if size == (64, 32) else {"Pad", "Slice"})


@pytest.mark.parametrize("opset", [17, 23])
def test_other_opsets_answer_the_same(tmp_path: Path, opset: int) -> None:
    folder = checkpoint(tmp_path / "checkpoint", {**TINY, "block": "naf", "norm": "none", "attention": "channel"})
    settings = ExportSettings(opset=opset)
    case = Case(folder, settings, export_model(folder, tmp_path / "model.onnx", "unet", settings))
    assert [entry.version for entry in onnx.load(case.done.path).opset_import] == [opset]
    assert_as_the_restorer(case, case.session(), (37, 53), 1)


def test_the_same_checkpoint_gives_the_same_bytes(exported: Callable[[str], Case], tmp_path: Path) -> None:
    first = exported("group")
    again = export_model(first.folder, tmp_path / "again.onnx", "unet@3", first.settings)
    assert again.sha256 == first.done.sha256
    assert again.path.read_bytes() == first.done.path.read_bytes()


def test_a_graph_of_other_weights_is_refused(exported: Callable[[str], Case], tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", VARIANTS["group"][0], seed=1)
    data = exported("group").done.path.read_bytes()
    with pytest.raises(KintsugiError, match="differ from the model's by up to"):
        export.check_parity(data, Restorer.from_checkpoint(other), [(40, 40)])


def test_a_graph_whose_answers_are_not_the_models_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kintsugi.export.parity.TOLERANCE", 1e-9)
    folder = checkpoint(tmp_path / "checkpoint", TINY)
    with pytest.raises(KintsugiError, match="nothing is written"):
        export_model(folder, tmp_path / "model.onnx", "unet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("values", [{"opset": 16}, {"opset": 99}, {"size": (0, 8)}])
def test_settings_that_cannot_work_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        ExportSettings(**values)


def test_a_model_without_a_mask_takes_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.mask=none"):
        export_model(checkpoint(tmp_path / "c", TINY), tmp_path / "model.onnx", "unet", MASKED)


def test_openvino_answers_as_onnxruntime(exported: Callable[[str], Case]) -> None:
    openvino = pytest.importorskip("openvino")
    for name in ("light", "naf", "group", "demo"):
        case = exported(name)
        model = openvino.Core().compile_model(case.done.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        image = planes(picture((101, 67), int(case.done.inputs["image"][1])).to_unit())[None]
        for place, part in zip(model.outputs, case.session().run(None, {"image": image}), strict=True):
            np.testing.assert_allclose(model({"image": image})[place], part, rtol=0, atol=1e-4)


def test_the_documented_lines_for_onnxruntime_work(
    exported: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    import cv2

    case = exported("light")
    (tmp_path / "light.onnx").write_bytes(case.done.path.read_bytes())
    image = picture((53, 37), 1)
    cv2.imwrite(str(tmp_path / "part.png"), image.pixels)
    lines = re.search(r"```python\n(.*?)```", (repository / "docs/export.md").read_text(), re.DOTALL)
    assert lines is not None
    monkeypatch.chdir(tmp_path)
    exec(lines[1], {})
    found = cv2.imread("restored.png", cv2.IMREAD_UNCHANGED)
    wanted = case.restorer().restore(image).image.pixels
    assert found.dtype == np.uint16
    assert np.abs(found.astype(int) - wanted).max() <= 7
