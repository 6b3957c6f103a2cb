import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from kintsugi.data.dataset import build_dataset, inspect_dataset
from kintsugi.data.layouts import SPLITS, read_layout
from kintsugi.data.sample import RawSample, Sample, decode_sample
from kintsugi.data.synthetic import write_synthetic
from kintsugi.storage import MemoryStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("synthetic"), parts=45, size=96)


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[Sample]:
    found = list(read_layout("pairs", folder))
    return [decode_sample(item) for item in found if isinstance(item, RawSample)]


def test_every_image_is_read_by_the_reader_of_pairs(samples: list[Sample]) -> None:
    assert len(samples) == 45 * 3
    assert {sample.clean.size for sample in samples} == {(96, 96)}
    assert {sample.clean.bit_depth for sample in samples} == {8, 16}
    assert {sample.category for sample in samples} == {"brick", "gravel", "grass", "metal", "weave"}


def test_each_split_holds_every_material_and_every_defect(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "manifest.csv").open()))
    for split in SPLITS:
        held = [row for row in rows if row["split"] == split]
        assert len({row["category"] for row in held}) == 5 and len({row["defect_type"] for row in held}) == 5


@pytest.mark.parametrize("parts", [9, 12, 20])
def test_a_small_set_has_all_splits_too(tmp_path: Path, parts: int) -> None:
    store = MemoryStore()
    report = build_dataset("pairs", write_synthetic(tmp_path, parts=parts, size=64), "demo", store)
    assert not report.bad and set(inspect_dataset(store, "demo").counts.splits) == set(SPLITS)


def test_a_defect_changes_the_surface_where_its_mask_is_and_hardly_elsewhere(samples: list[Sample]) -> None:
    for _, group in itertools.groupby(samples, key=lambda sample: sample.part_id):
        shots = {sample.defect_type: sample for sample in group}
        good = shots.pop("good")
        assert not good.mask.any() and len(shots) == 2
        for shot in shots.values():
            change = np.abs(shot.clean.to_unit() - good.clean.to_unit())
            assert 0.0005 < shot.mask.mean() < 0.3
            assert np.median(change[shot.mask]) > 0.04, shot.sample_id
            assert np.median(change[~shot.mask]) < 1e-3 and change[~shot.mask].mean() < 0.01, shot.sample_id


def test_no_piece_of_a_photograph_is_in_two_parts(samples: list[Sample]) -> None:
    good = [s for s in samples if s.defect_type == "good"]
    assert len({s.clean.pixels.tobytes() for s in good}) == len(good) == 45


def test_drawn_surfaces_follow_when_the_photographs_are_used_up(tmp_path: Path) -> None:
    write_synthetic(tmp_path, parts=15, size=300)
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    photographed = {row["part"] for row in rows if row["category"] in ("brick", "gravel", "grass")}
    assert len(photographed) == 3 and len({row["part"] for row in rows}) == 15


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    one, two, other = (
        write_synthetic(tmp_path / name, seed=seed, parts=5, size=64)
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    files = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    assert len(files) == 30
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
    assert any((one / f).read_bytes() != (other / f).read_bytes() for f in files)
