"""What docs/data.md shows is what happens."""

import re
from pathlib import Path

import numpy as np
import pytest

from kintsugi.data.layouts import BadPair, read_layout
from kintsugi.imaging import Image, encode


@pytest.fixture
def page(repository: Path) -> str:
    return (repository / "docs/data.md").read_text()


def test_the_manifest_that_is_shown_is_read_as_the_table_says(page: str, tmp_path: Path) -> None:
    shown = re.search(r"```csv\n(name,part.*?)```", page, re.DOTALL)
    assert shown is not None
    (tmp_path / "manifest.csv").write_text(shown[1])
    for folder in ("clean", "mask"):
        (tmp_path / folder).mkdir()
    for name in ("a001", "a002"):
        (tmp_path / "clean" / f"{name}.png").write_bytes(encode(Image(np.full((20, 20), 4000, np.uint16))))
        mask = np.zeros((20, 20), np.uint8)
        mask[4:6, 4:6] = 255 * (name == "a001")
        (tmp_path / "mask" / f"{name}_mask.png").write_bytes(encode(Image(mask)))
    read = list(read_layout("pairs", tmp_path))
    assert not [sample for sample in read if isinstance(sample, BadPair)]
    told = [(s.part_id, s.category, s.defect_type, s.split, s.white_level) for s in read if not isinstance(s, BadPair)]
    assert told == [("4711", "bottle", "scratch", "train", 4095), ("4711", "bottle", "good", "train", 4095)]


def test_a_folder_with_clean_images_alone_is_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "clean/bottle").mkdir(parents=True)
    (tmp_path / "clean/bottle/a001.png").write_bytes(encode(Image(np.full((20, 20), 7, np.uint8))))
    (sample,) = read_layout("pairs", tmp_path)
    assert not isinstance(sample, BadPair)
    assert (sample.category, sample.degraded, sample.mask) == ("bottle", None, None)
