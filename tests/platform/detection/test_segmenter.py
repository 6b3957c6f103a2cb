import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kintsugi.data.planted import plant_spot
from kintsugi.data.sample import Sample
from kintsugi.detection.segmenter import CARD, WEIGHTS, Segmenter, _Crops, clean_average_precision, train_detector
from kintsugi.errors import DataError, IntegrityError
from kintsugi.imaging import Image


@dataclass
class Surfaces:
    """Faint noise with one dark spot of 9 px on every second image."""

    count: int
    seed: int
    known: bool = True

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        generator = np.random.default_rng([self.seed, index])
        unit = np.clip(0.6 + 0.02 * generator.standard_normal((48, 40)), 0, 1).astype(np.float32)
        mask = np.zeros(unit.shape, bool)
        if index % 2:
            unit, mask = plant_spot(unit, generator, diameter=9, contrast=-0.4)
        clean = Image(np.rint(unit * 255).astype(np.uint8))
        kind = "spot" if mask.any() else "good"
        return Sample(str(index), str(index), "noise", kind, clean, mask, None, self.known)


@pytest.fixture(scope="module")
def trained() -> Segmenter:
    torch.set_num_threads(1)
    losses: list[float] = []
    made = train_detector(
        Surfaces(12, 1), Surfaces(6, 2), steps=60, width=8, crop=64, batch=2, learning_rate=5e-3,
        trained_on="noise with spots", progress=lambda _, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < losses[0]
    return made


def test_a_few_steps_find_an_obvious_spot(trained: Segmenter) -> None:
    assert trained.card.val_average_precision is not None
    assert trained.card.val_average_precision > 0.8
    assert (trained.card.train_images, trained.card.train_defect_images) == (12, 6)


def test_the_score_does_not_depend_on_the_exposure(trained: Segmenter) -> None:
    clean = Surfaces(2, 5).sample(1).clean
    darker = Image((clean.pixels // 2).astype(np.uint8))
    assert np.abs(trained(clean) - trained(darker)).max() < 0.2
    deep = Image((clean.pixels.astype(np.uint16) * 16), white_level=4080)
    assert np.abs(trained(clean) - trained(deep)).max() < 1e-4


def test_training_is_the_same_for_the_same_seed() -> None:
    once, again = (
        train_detector(Surfaces(4, 1), Surfaces(2, 2), steps=2, width=4, crop=64, batch=1, seed=3) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once.net.parameters(), again.net.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (17, 3), (3, 5, 3), (33, 100)])
def test_every_size_gets_a_map_of_its_size(trained: Segmenter, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    scores = trained(Image(pixels))
    assert scores.shape == shape[:2]
    assert scores.dtype == np.float32
    assert scores.min() >= 0 and scores.max() <= 1


def test_a_constant_image_gets_a_finite_map(trained: Segmenter) -> None:
    assert np.isfinite(trained(Image(np.full((20, 20), 7, np.uint8)))).all()


def test_a_large_image_is_scored_by_tiles_nearly_as_it_is_whole(
    trained: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (130, 210)).astype(np.uint8)
    whole = trained(Image(pixels))
    monkeypatch.setattr("kintsugi.detection.segmenter._TILE", 64)
    assert np.abs(trained(Image(pixels)) - whole).max() < 0.02


def test_a_saved_detector_answers_as_before(trained: Segmenter, tmp_path: Path) -> None:
    trained.save(tmp_path / "spots")
    loaded = Segmenter.load(tmp_path / "spots")
    image = Surfaces(2, 7).sample(1).clean
    assert loaded.card == trained.card
    assert np.array_equal(loaded(image), trained(image))


def test_a_damaged_folder_is_refused(trained: Segmenter, tmp_path: Path) -> None:
    trained.save(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"x")
    with pytest.raises(IntegrityError, match="manifest"):
        Segmenter.load(tmp_path)


def test_weights_of_another_width_are_refused(trained: Segmenter, tmp_path: Path) -> None:
    card = trained.card.model_copy(update={"width": 12})
    Segmenter(trained.net, card).save(tmp_path)
    with pytest.raises(IntegrityError, match="do not fit"):
        Segmenter.load(tmp_path)


def test_the_card_tells_the_clean_score_beside_the_recipe(trained: Segmenter, tmp_path: Path) -> None:
    trained.save(tmp_path)
    card = json.loads((tmp_path / CARD).read_text())
    assert card["val_average_precision"] == trained.card.val_average_precision
    assert card["trained_on"] == "noise with spots"


def test_unlabelled_images_teach_nothing() -> None:
    with pytest.raises(DataError, match="masks to learn from"):
        train_detector(Surfaces(4, 1, known=False), Surfaces(2, 2), steps=1)


def test_a_crop_that_does_not_fit_the_strides_is_refused() -> None:
    with pytest.raises(DataError, match="multiple of 32"):
        train_detector(Surfaces(4, 1), Surfaces(2, 2), steps=1, crop=80)


def test_the_clean_score_of_a_split_without_defects_is_absent(trained: Segmenter) -> None:
    assert clean_average_precision(trained, Surfaces(1, 3)) is None


def test_varied_grain_changes_the_crops_and_not_the_masks(tmp_path: Path) -> None:
    plain, varied = (_Crops(Surfaces(12, 1), 0, vary_grain) for vary_grain in (False, True))
    (image, mask), (other, same) = (crops.batch(0, 32, 20) for crops in (plain, varied))
    assert torch.equal(mask, same)
    changed = [not torch.equal(a, b) for a, b in zip(image, other, strict=True)]
    assert 6 <= sum(changed) <= 18
    made = train_detector(Surfaces(4, 1), Surfaces(2, 2), steps=2, width=8, crop=64, batch=1, vary_grain=True)
    made.save(tmp_path / "d")
    assert Segmenter.load(tmp_path / "d").card.vary_grain
