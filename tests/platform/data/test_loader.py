import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kintsugi.config import ExperimentConfig, parse_config
from kintsugi.data.dataset import SplitReader, build_dataset, open_split
from kintsugi.data.degradation import PRESETS
from kintsugi.data.loader import Crops, EpochKeys, TrainCrops, build_train_loader, evaluation_pair
from kintsugi.data.sample import Sample
from kintsugi.errors import DataError
from kintsugi.imaging import Image, convert, encode
from kintsugi.storage import MemoryStore

Pairs = Callable[..., Path]
Write = Callable[[str, Image | np.ndarray | bytes], None]
Picture = Callable[..., Image]


def config_with(**sections: dict[str, Any]) -> ExperimentConfig:
    data = {"crop": 16, "batch_size": 4, **sections.get("data", {})}
    degradation = {"presets": {"noise": 1.0}, **sections.get("degradation", {})}
    model = {"channels": 1, "levels": 2, "skips": True, "reduction": 1, "mask": "optional", **sections.get("model", {})}
    train = {"workers": 1, **sections.get("train", {})}
    return parse_config({"data": data, "degradation": degradation, "model": model, "train": train})


def open_pairs(folder: Path, cache: Path) -> SplitReader:
    store = MemoryStore()
    build_dataset("pairs", folder, "steel", store, fractions=(1, 0, 0))
    return open_split(store, "steel", "train", cache)


@pytest.fixture
def reader(pairs: Pairs, tmp_path: Path) -> SplitReader:
    return open_pairs(pairs(5), tmp_path / "cache")


def equal(one: Crops, two: Crops) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def shares(crops: Iterable[Crops], figure: Callable[[Crops], float]) -> float:
    return float(np.mean([figure(crop) for crop in crops]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("colour", [False, True])
def test_a_crop_has_the_channels_of_the_model_whatever_the_image_has(
    pairs: Pairs, tmp_path: Path, channels: int, colour: bool
) -> None:
    crop = TrainCrops(open_pairs(pairs(2, colour=colour), tmp_path), config_with(model={"channels": channels}))[0, 0]
    assert crop.degraded.shape == crop.clean.shape == (channels, 16, 16)
    assert crop.mask.shape == (1, 16, 16) and crop.mask_known.shape == ()
    assert {part.dtype for part in crop} == {torch.float32}
    if channels == 3:
        assert torch.equal(crop.clean[0], crop.clean[1]) is not colour
    assert not torch.equal(crop.degraded, crop.clean)


def test_a_crop_follows_from_seed_epoch_and_sample_alone(reader: SplitReader) -> None:
    crops = TrainCrops(reader, config_with())
    first = crops[3, 1]
    crops[0, 0]
    assert equal(first, TrainCrops(reader, config_with())[3, 1])
    assert not equal(first, crops[4, 1])
    assert not equal(first, crops[3, 1, 1]), "a second pass over the data repeats the crop of the first"
    assert equal(first, crops[3, 1, 0])
    assert not equal(first, TrainCrops(reader, config_with(train={"seed": 1}))[3, 1])


def test_clean_and_mask_are_the_same_cut_of_the_same_image(write: Write, tmp_path: Path) -> None:
    """The image is bright exactly where the mask is set, so the crop must be so too, however it is turned."""
    mask = np.zeros((40, 50), np.bool_)
    mask[10:30, 12:15] = True
    write("in/clean/a.png", Image(np.where(mask, 200, 10).astype(np.uint8)))
    write("in/mask/a.png", mask)
    crops = TrainCrops(open_pairs(tmp_path / "in", tmp_path / "cache"), config_with(data={"defect_crops": 1.0}))
    seen = [crops[epoch, 0] for epoch in range(40)]
    assert all(torch.equal(crop.clean > 0.5, crop.mask > 0.5) for crop in seen)
    assert all(crop.mask.any() for crop in seen)
    upright = sum(bool(crop.mask[0].any(0).sum() <= 3) for crop in seen)
    assert 5 < upright < 35, "crops are never, or always, turned"


def test_defect_crops_hold_a_defect_and_the_share_is_kept(write: Write, tmp_path: Path) -> None:
    mask = np.zeros((200, 200), np.bool_)
    mask[3:5, 190:192] = True
    write("in/clean/a.png", Image(np.full((200, 200), 99, np.uint8)))
    write("in/mask/a.png", mask)
    reader = open_pairs(tmp_path / "in", tmp_path / "cache")
    for share, low, high in ((0.0, 0.0, 0.05), (0.5, 0.35, 0.65), (1.0, 1.0, 1.0)):
        crops = TrainCrops(reader, config_with(data={"defect_crops": share}))
        found = shares((crops[epoch, 0] for epoch in range(120)), lambda crop: float(crop.mask.any()))
        assert low <= found <= high


def test_a_tiny_defect_is_cut_as_often_as_a_large_one(write: Write, tmp_path: Path) -> None:
    mask = np.zeros((120, 120), np.bool_)
    mask[5:65, 5:65] = True
    mask[110, 110] = True
    write("in/clean/a.png", Image(np.full((120, 120), 99, np.uint8)))
    write("in/mask/a.png", mask)
    crops = TrainCrops(open_pairs(tmp_path / "in", tmp_path), config_with(data={"defect_crops": 1.0}))
    tiny = shares((crops[epoch, 0] for epoch in range(200)), lambda crop: float(crop.mask.sum() == 1))
    assert 0.35 < tiny < 0.65


def test_crops_reach_every_border_of_the_image(write: Write, tmp_path: Path) -> None:
    ramp = np.arange(20 * 20, dtype=np.uint16).reshape(20, 20)
    write("in/clean/a.png", Image(ramp, "png", 65535))
    crops = TrainCrops(open_pairs(tmp_path / "in", tmp_path / "cache"), config_with(data={"flips": False}))
    corners = {int(crops[epoch, 0].clean[0, 0, 0] * 65535 + 0.5) for epoch in range(300)}
    assert corners == {20 * y + x for y in range(5) for x in range(5)}


def test_an_image_smaller_than_the_crop_is_mirrored_and_never_resized(write: Write, tmp_path: Path) -> None:
    pixels = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9) * 4
    write("in/clean/a.png", Image(pixels))
    crops = TrainCrops(open_pairs(tmp_path / "in", tmp_path / "cache"), config_with(data={"flips": False}))
    crop = crops[0, 0].clean[0].numpy()
    assert np.allclose(crop, np.pad(pixels / np.float32(255), ((5, 5), (3, 4)), mode="reflect"))


def test_an_image_of_one_row_can_be_cropped(write: Write, tmp_path: Path) -> None:
    write("in/clean/a.png", Image(np.arange(30, dtype=np.uint8)[None]))
    crop = TrainCrops(open_pairs(tmp_path / "in", tmp_path / "cache"), config_with(data={"flips": False}))[0, 0]
    assert crop.clean.shape == (1, 16, 16) and torch.equal(crop.clean[0, 0], crop.clean[0, 9])


def test_blur_at_the_edge_of_a_crop_sees_the_image_around_it(write: Write, picture: Picture, tmp_path: Path) -> None:
    """Defocus has no phase and, at these strengths, hardly any noise: a crop is a cut of the whole blurred image."""
    image = picture(3, size=(60, 60))
    write("in/clean/a.png", image)
    config = config_with(data={"flips": False}, degradation={"presets": {"defocus": 1.0}})
    crops = TrainCrops(open_pairs(tmp_path / "in", tmp_path / "cache"), config)
    edges, middles = [], []
    for epoch in range(60):
        crop = crops[epoch, 0]
        error = (crop.degraded - crop.clean)[0].square()
        edges.append(float(error[0].mean()))
        middles.append(float(error[8].mean()))
    assert np.isclose(np.mean(edges), np.mean(middles), rtol=0.15)


def test_horizontal_motion_stays_horizontal_though_crops_are_turned(
    write: Write, picture: Picture, tmp_path: Path
) -> None:
    write("in/clean/a.png", picture(3, size=(120, 120)))
    config = config_with(data={"crop": 64}, degradation={"presets": {"kla": 1.0}})
    crops = TrainCrops(open_pairs(tmp_path / "in", tmp_path / "cache"), config)
    for epoch in range(12):
        blurred = crops[epoch, 0].degraded[0]
        along, across = (blurred.diff(dim=d).square().mean() for d in (1, 0))
        assert along < across


def test_given_degraded_images_are_used_unless_told_otherwise(write: Write, picture: Picture, tmp_path: Path) -> None:
    write("in/clean/a.png", picture(1))
    write("in/degraded/a.png", Image(255 - picture(1).pixels))
    reader = open_pairs(tmp_path / "in", tmp_path / "cache")
    crop = TrainCrops(reader, config_with())[0, 0]
    assert torch.allclose(crop.degraded, 1 - crop.clean, atol=1e-6)
    crop = TrainCrops(reader, config_with(degradation={"use_given": False}))[0, 0]
    assert not torch.allclose(crop.degraded, 1 - crop.clean, atol=0.1)


def test_a_withheld_mask_is_flagged_and_kept_for_the_loss(reader: SplitReader) -> None:
    data = {"mask_dropout": 0.5, "defect_crops": 1.0}
    scratched = [index for index, name in enumerate(reader.sample_ids) if name.endswith("-0")]
    crops = TrainCrops(reader, config_with(data=data))
    seen = [crops[epoch, index] for epoch in range(40) for index in scratched]
    assert 0.35 < shares(seen, lambda crop: float(crop.mask_known)) < 0.65
    assert all(crop.mask.any() for crop in seen)
    always = TrainCrops(reader, config_with())
    assert all(float(always[epoch, 0].mask_known) == 1 for epoch in range(20))


def test_the_mask_of_an_unlabelled_image_is_never_known(write: Write, picture: Picture, tmp_path: Path) -> None:
    write("in/clean/a.png", picture(1))
    crops = TrainCrops(open_pairs(tmp_path / "in", tmp_path / "cache"), config_with())
    assert all(float(crops[epoch, 0].mask_known) == 0 for epoch in range(10))


def test_sixteen_bits_reach_the_model(pairs: Pairs, tmp_path: Path) -> None:
    reader = open_pairs(pairs(2, bits=16), tmp_path / "cache")
    crop = TrainCrops(reader, config_with(data={"crop": 24}))[0, 0]
    assert len(crop.clean.unique()) > 400 and len(crop.degraded.unique()) > 256


def keys(count: int, **how: int) -> list[tuple[int, ...]]:
    return list(EpochKeys(count, **{"seed": 0, "epoch": 0, "batch": 8, **how}))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_another_number_of_workers_sees_the_same_micro_batches_of_the_same_global_batches(world: int) -> None:
    def of(rank: int, world: int) -> list[list[tuple[int, ...]]]:
        found = keys(13, seed=3, epoch=2, rank=rank, world=world, parts=4)
        return [found[start : start + 2] for start in range(0, len(found), 2)]

    each = [of(rank, 4) for rank in range(4)]
    shared = [of(rank, world) for rank in range(world)]
    for rank, part in enumerate(shared):
        own = [each[m][step] for step in range(2) for m in range(rank, 4, world)]
        assert part == own
    assert {index for part in shared for batch in part for _, index, _ in batch} == set(range(13))


def test_an_epoch_drops_no_image_and_is_ordered_anew_each_time() -> None:
    def of(epoch: int, seed: int = 0) -> list[int]:
        return [index for _, index, _ in keys(10, seed=seed, epoch=epoch, batch=4)]

    assert sorted(of(0)[:10]) == list(range(10)) and of(0)[10:] == of(0)[:2]
    assert of(0) == of(0) and of(0) != of(1) and of(0) != of(0, seed=1)


def test_fewer_images_than_a_batch_fill_it() -> None:
    assert len(keys(3, rank=1, world=2, parts=2)) == 4


def test_an_epoch_goes_on_where_it_was_left() -> None:
    for rank in range(2):
        whole = keys(13, rank=rank, world=2, parts=4, steps=5)
        assert keys(13, rank=rank, world=2, parts=4, steps=5, start=3) == whole[3 * 4 :]
        assert len(EpochKeys(13, seed=0, epoch=0, batch=8, rank=rank, world=2, parts=4, steps=5, start=3)) == 2 * 4


def test_an_epoch_of_given_length_takes_that_many_steps(reader: SplitReader) -> None:
    for steps in (1, 7):
        loader = build_train_loader(reader, config_with(train={"steps_per_epoch": steps}), epoch=0, rank=0, world=1)
        assert len(list(loader)) == len(loader) == steps


def test_passes_over_the_data_within_one_epoch_cut_new_crops(pairs: Pairs, tmp_path: Path) -> None:
    reader = open_pairs(pairs(1), tmp_path / "cache")
    config = config_with(data={"batch_size": 2}, train={"steps_per_epoch": 2})
    first, second = build_train_loader(reader, config, epoch=0, rank=0, world=1)
    assert not torch.equal(first.degraded, second.degraded)


def test_two_workers_together_see_what_one_sees(reader: SplitReader) -> None:
    config = config_with(train={"workers": 2})
    alone = list(build_train_loader(reader, config, epoch=1))
    halves = [list(build_train_loader(reader, config, epoch=1, rank=rank, world=2)) for rank in (0, 1)]
    assert all(map(equal, alone[0::2], halves[0])) and all(map(equal, alone[1::2], halves[1]))
    assert len(alone) == 2 * len(halves[0])


def test_decoding_processes_change_nothing_and_start_after_the_parent_has_computed(reader: SplitReader) -> None:
    plain = list(build_train_loader(reader, config_with(), epoch=0, rank=0, world=1))
    config = config_with(data={"loader_processes": 2})
    assert all(map(equal, plain, build_train_loader(reader, config, epoch=0, rank=0, world=1)))


def test_more_workers_than_parts_of_a_batch_are_refused(reader: SplitReader) -> None:
    with pytest.raises(DataError, match=r"train\.workers=3"):
        build_train_loader(reader, config_with(), epoch=0, rank=0, world=3)


def sample_of(clean: Image, degraded: Image | None = None, name: str = "a") -> Sample:
    return Sample(name, name, "steel", "good", clean, np.zeros(clean.size, np.bool_), degraded)


def test_an_image_is_evaluated_on_the_same_pixels_in_every_run_and_process(picture: Picture) -> None:
    clean = picture(1)
    here = evaluation_pair(sample_of(clean), config_with())[0].pixels
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there, _, _ = pool.apply(evaluation_pair, (sample_of(clean), config_with()))
    assert np.array_equal(there.pixels, here)
    reseeded = config_with(train={"seed": 9, "workers": 2})
    assert np.array_equal(evaluation_pair(sample_of(clean), reseeded)[0].pixels, here)
    assert not np.array_equal(evaluation_pair(sample_of(clean, name="b"), config_with())[0].pixels, here)


def test_evaluation_keeps_size_depth_and_white_level(picture: Picture) -> None:
    clean = Image(picture(1, size=(31, 45), bits=12).pixels, "png", 4095)
    degraded, same, mask = evaluation_pair(sample_of(clean), config_with())
    assert same is clean and mask.shape == (31, 45)
    assert (degraded.size, degraded.bit_depth, degraded.white_level) == ((31, 45), 16, 4095)


def test_evaluation_prefers_the_given_image_and_never_writes_jpeg(picture: Picture) -> None:
    clean, given = convert(picture(1), "jpeg"), picture(2)
    assert evaluation_pair(sample_of(clean, given), config_with())[0] is given
    made = evaluation_pair(sample_of(clean, given), config_with(degradation={"use_given": False}))[0]
    assert made.format == "png" and encode(made)


def test_every_preset_can_be_drawn(reader: SplitReader) -> None:
    config = config_with(degradation={"presets": dict.fromkeys(PRESETS, 1.0)})
    crops = TrainCrops(reader, config)
    assert all(torch.isfinite(crops[epoch, 0].degraded).all() for epoch in range(30))


def test_a_kept_exposure_is_what_is_learned_and_its_scale_is_told(reader: SplitReader) -> None:
    low = {"presets": {"lowlight": 1.0}}
    undo, keep = (
        TrainCrops(reader, config_with(degradation={**low, "exposure": exposure}))[0, 0]
        for exposure in ("undo", "keep")
    )
    assert torch.equal(undo.degraded, keep.degraded)
    assert undo.scale == 1 and 2 <= keep.scale <= 4
    assert torch.allclose(keep.clean * keep.scale, undo.clean, atol=1e-5)


def test_planted_defects_are_in_the_clean_image_and_in_the_mask(write: Write, tmp_path: Path) -> None:
    write("in/clean/a.png", Image(np.full((64, 64), 128, np.uint8)))
    write("in/mask/a.png", np.zeros((64, 64), np.bool_))
    reader = open_pairs(tmp_path / "in", tmp_path / "cache")
    crops = TrainCrops(reader, config_with(data={"planted": 1.0, "crop": 64}))
    plain = TrainCrops(reader, config_with(data={"planted": 0.0, "crop": 64}))
    for epoch in range(5):
        crop = crops[epoch, 0]
        changed = (crop.clean - 128 / 255).abs() > 1e-6
        assert crop.mask.any() and changed.any()
        assert (changed | (crop.mask == 0)).all(), "every marked pixel differs"
    assert not plain[0, 0].mask.any() and plain[0, 0].clean.std() == 0
