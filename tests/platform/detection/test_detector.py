from pathlib import Path

import numpy as np
import pytest

from kintsugi.detection.detectability import Map
from kintsugi.detection.detector import Detector, build_detector, defect_map, load_detector
from kintsugi.detection.segmenter import Segmenter, SegmenterCard, SegmenterNet
from kintsugi.errors import ConfigError, DataError
from kintsugi.imaging import Image
from kintsugi.storage import LocalStore

IMAGE = Image(np.zeros((4, 6), np.uint8))

PLUGIN = """
import numpy as np

def darkness(image):
    return 1 - image.to_unit()

class Brightness:
    def __call__(self, image):
        return image.to_unit()

limit = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_inspection.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "some_inspection"


def test_a_function_of_ones_own_is_a_detector(plugin: str) -> None:
    assert defect_map(load_detector(f"{plugin}:darkness"), IMAGE).min() == 1


def test_a_class_is_made_before_it_is_used(plugin: str) -> None:
    assert defect_map(load_detector(f"{plugin}:Brightness"), IMAGE).max() == 0


def test_a_folder_is_loaded_as_our_own_segmenter(tmp_path: Path) -> None:
    card = SegmenterCard(
        width=4, steps=0, seed=0, crop=16, batch=1, train_images=1, train_defect_images=1, val_images=0,
        val_average_precision=None,
    )  # fmt: skip
    Segmenter(SegmenterNet(4), card).save(tmp_path / "own")
    detector = load_detector(str(tmp_path / "own"))
    assert isinstance(detector, Segmenter)
    assert isinstance(detector, Detector)
    assert defect_map(detector, IMAGE).shape == (4, 6)


@pytest.mark.parametrize("spec", ["no/such/folder", "no_such_module:find", "some_inspection:nothing", ":find"])
def test_a_name_that_nothing_answers_to_is_refused(plugin: str, spec: str) -> None:
    with pytest.raises(ConfigError, match="detector"):
        load_detector(spec)


def test_what_cannot_be_called_is_no_detector(plugin: str) -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        load_detector(f"{plugin}:limit")


@pytest.mark.parametrize(
    "answer",
    [np.zeros((6, 4)), np.full((4, 6), 1.5), np.full((4, 6), -0.1), np.full((4, 6), np.nan)],
    ids=["size", "above", "below", "nan"],
)
def test_a_map_that_breaks_the_contract_is_named(answer: Map) -> None:
    with pytest.raises(DataError, match="detector"):
        defect_map(lambda _: answer, IMAGE)


def test_a_detector_of_a_dataset_tells_its_clean_scores(
    tiny_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINTSUGI_CACHE", str(tmp_path / "cache"))
    card = build_detector(tiny_store, "tiny", tmp_path / "own", steps=2)
    detector = load_detector(tmp_path / "own")
    assert isinstance(detector, Segmenter) and detector.card == card
    assert card.val_average_precision is not None and 0 < card.val_average_precision <= 1
    assert card.test_average_precision is not None
    assert card.trained_on.startswith("tiny, digest ")


def test_a_dataset_that_is_not_there_is_named(tiny_store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset"):
        build_detector(tiny_store, "missing", tmp_path / "own")
