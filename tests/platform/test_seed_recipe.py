"""`configs/seed.yaml` says what the published recipe's text says, and every part of it takes part in a step."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.data.dataset import open_split
from kintsugi.losses import build_loss
from kintsugi.models import PerceptualDistance, build_model
from kintsugi.storage import LocalStore
from kintsugi.training.loop import fit
from kintsugi.training.state import TrainState, build_state


@pytest.fixture
def seed(repository: Path) -> ExperimentConfig:
    return load_config(repository / "platform/configs/seed.yaml")


def test_the_recipe_is_kept_as_its_text_tells_it(seed: ExperimentConfig) -> None:
    model, weights = seed.model, seed.loss.weights
    assert (model.channels, model.base, model.levels, model.mask) == (3, 64, 4, "given")
    assert model.skips == ("off",) * 4 and set(model.reduction) == {16} and model.dropout == 0.15
    parts = (weights.defect, weights.ssim, weights.perceptual, weights.edge, weights.basic)
    assert parts == (0.25, 0.30, 0.20, 0.15, 0.10)
    assert (seed.optim.learning_rate, seed.train.patience, seed.data.batch_size) == (1e-4, 25, 8)
    assert seed.loss.perceptual.weights == "imagenet"


def test_rgb_and_mask_go_in_and_rgb_comes_out(seed: ExperimentConfig) -> None:
    model = build_model(seed.model).eval()
    assert model.encoder.stages[0][0][0].in_channels == 4
    with torch.inference_mode():
        image, mask = torch.rand(1, 3, 48, 40), torch.zeros(1, 1, 48, 40)
        assert model(image, mask).image.shape == image.shape


def test_the_recipe_trains(seed: ExperimentConfig, tiny_store: LocalStore) -> None:
    # A small crop and seeded random VGG weights stand in for 256 px and ImageNet's: the rest is the recipe.
    small = {
        "data.dataset": "tiny",
        "data.crop": 32,
        "loss.perceptual.weights": "random",
        "train.epochs": 1,
        "train.steps_per_epoch": 1,
        "train.validation_images": 1,
    }
    config = with_values(seed, small)
    train, val = open_split(tiny_store, "tiny", "train"), open_split(tiny_store, "tiny", "val")
    state, seen = build_state(config, train.digest), {}
    before = {name: value.clone() for name, value in state.model.state_dict().items()}

    def report(metrics: Mapping[str, float], _: TrainState) -> None:
        seen.update(metrics)

    fit(state, config, train, val, build_loss(config.loss, PerceptualDistance(config.loss.perceptual)), report)
    assert {f"loss/{part}" for part in ("defect", "ssim", "perceptual", "edge", "basic")} <= seen.keys()
    assert [name for name, value in state.model.state_dict().items() if torch.equal(value, before[name])] == []
