import re
from pathlib import Path

import numpy as np
import pytest

from kintsugi.config import ExperimentConfig
from kintsugi.data.dataset import build_dataset, open_split
from kintsugi.evaluation.report import SHOWN, write_report
from kintsugi.evaluation.scorecard import Scorecard, evaluate
from kintsugi.evaluation.survival import Cell, SurvivalCurve
from kintsugi.imaging import Image, encode, encode_mask
from kintsugi.metrics import Fidelity
from kintsugi.models import build_model
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import LocalStore


def darkness(image: Image) -> np.ndarray:
    return 1 - image.to_unit()


def written(
    store: LocalStore, config: ExperimentConfig, path: Path, *, dataset: str = "tiny", count: int = 12, **more: object
) -> tuple[Scorecard, str]:
    reader = open_split(store, dataset, "val")
    restorer = Restorer(build_model(config.model).eval())
    card = evaluate(restorer, reader, config, dataset=dataset, split="val", model="<m>@1", detector=darkness)
    card = card.model_copy(update=more)
    return card, write_report(card, restorer, reader, config, path, count=count).read_text()


def test_the_report_needs_nothing_but_itself(
    tmp_path: Path, tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    cell = Cell(
        diameter=2, contrast=0.08, kept=0.5, kept_low=0.4, kept_high=0.6, survived=0.5, degraded_kept=0.3,
        degraded_survived=0.1, count=3,
    )  # fmt: skip
    card, page = written(
        tiny_store, tiny_config, tmp_path / "report.html", survival=SurvivalCurve(cells=(cell,), images=3)
    )
    assert "http:" not in page and "https:" not in page and "<script" not in page and "@import" not in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert set(re.findall(r'(?:href|url)(?:="|\()([^")]?)', page)) <= {"#"}
    assert page.count('class="strip"') == len(card.images) == 2
    assert page.count("<svg") == 3 and "Where planted defects vanish" in page
    assert "&lt;m&gt;@1" in page and "<m>" not in page


def test_both_conventions_stand_apart_by_name_and_every_measured_figure_is_named(
    tmp_path: Path, tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    card, page = written(tiny_store, tiny_config, tmp_path / "report.html", count=1)
    tables, _, conventions = page.partition("Two conventions of defect figures")
    assert "over masked pixels" in conventions and "on image × mask" in conventions
    assert "on image × mask" not in tables
    assert SHOWN.keys() >= Fidelity.__dataclass_fields__.keys()
    assert all(SHOWN[name].title in page for name in card.overall)
    assert page.count('class="strip"') == 1
    assert "By preset, worst first" in page and "detectability recovered" in page


def test_of_a_large_image_the_defect_is_shown_at_native_resolution(
    tmp_path: Path, tiny_config: ExperimentConfig
) -> None:
    pixels = np.full((40, 900), 90, np.uint8)
    pixels[::3] = 110
    mask = np.zeros(pixels.shape, np.bool_)
    mask[10:20, 800:810] = True
    pixels[mask] = 30
    for kind, data in (("clean", encode(Image(pixels, "png", 255))), ("mask", encode_mask(mask))):
        (tmp_path / "wide" / kind).mkdir(parents=True)
        (tmp_path / "wide" / kind / "w.png").write_bytes(data)
    (tmp_path / "wide" / "manifest.csv").write_text("name,split\nw,val\n")
    store = LocalStore(tmp_path / "store")
    build_dataset("pairs", tmp_path / "wide", "wide", store)
    _, page = written(store, tiny_config, tmp_path / "report.html", dataset="wide")
    assert "window at row 0, column 260 of 40 x 900 px" in page


@pytest.mark.parametrize(("value", "told"), [(-0.00001, "+0.00"), (0.1234, "+12.34"), (-0.5, "-50.00")])
def test_figures_are_written_in_their_unit_and_without_a_sign_on_zero(value: float, told: str) -> None:
    assert SHOWN["background_invented"](value, "+") == told
