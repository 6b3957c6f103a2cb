from pathlib import Path

import pytest
import torch

from kintsugi.config import ExperimentConfig, with_values
from kintsugi.errors import IntegrityError, TrainingError
from kintsugi.training.state import build_state


def test_a_checkpoint_brings_back_optimizer_scheduler_and_counters(
    tmp_path: Path, tiny_config: ExperimentConfig
) -> None:
    state = build_state(tiny_config, "d")
    state.model(torch.rand(1, 1, 16, 16)).sum().backward()
    state.optimizer.step()
    for score in (1.0, 0.5):
        state.note(score)
    state.save(tmp_path, tiny_config, {"score": 0.5}, {})
    again = build_state(tiny_config, "d")
    again.load(tmp_path)
    assert (again.epoch, again.best, again.stale) == (2, 1.0, 1)
    assert again.scheduler.get_last_lr() == state.scheduler.get_last_lr()
    assert again.optimizer.state_dict()["state"].keys() == state.optimizer.state_dict()["state"].keys()


def test_another_dataset_is_refused(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    build_state(tiny_config, "one").save(tmp_path, tiny_config, {"score": 0.0}, {})
    with pytest.raises(TrainingError, match="trained on dataset one"):
        build_state(tiny_config, "two").load(tmp_path)


def test_another_model_is_refused(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    build_state(tiny_config, "d").save(tmp_path, tiny_config, {"score": 0.0}, {})
    with pytest.raises(IntegrityError, match="do not fit"):
        build_state(with_values(tiny_config, {"model.base": 16}), "d").load(tmp_path)


def test_weights_are_a_function_of_the_seed(tiny_config: ExperimentConfig) -> None:
    first, again = (build_state(tiny_config, "d").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
