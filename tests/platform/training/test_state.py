from pathlib import Path

import pytest
import torch

from kintsugi.checkpoint import load_checkpoint, load_model
from kintsugi.config import ExperimentConfig, with_values
from kintsugi.errors import TrainingError
from kintsugi.training.state import build_state


def test_a_checkpoint_brings_back_optimizer_scheduler_and_counters(
    tmp_path: Path, tiny_config: ExperimentConfig
) -> None:
    state = build_state(tiny_config, "d")
    state.model(torch.rand(1, 1, 16, 16)).image.sum().backward()
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
    with pytest.raises(TrainingError, match=r"another model \(model\.base was 8\)"):
        build_state(with_values(tiny_config, {"model.base": 16}), "d").load(tmp_path)


def test_averages_that_were_not_kept_cannot_be_gone_on_with(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    build_state(tiny_config, "d").save(tmp_path, tiny_config, {"score": 0.0}, {})
    with pytest.raises(TrainingError, match=r"optim\.ema"):
        build_state(with_values(tiny_config, {"optim.ema": 0.9}), "d").load(tmp_path)


def test_weights_are_a_function_of_the_seed(tiny_config: ExperimentConfig) -> None:
    first, again = (build_state(tiny_config, "d").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_averaged_weights_follow_the_model_and_come_back_with_it(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    config = with_values(tiny_config, {"optim.ema": 0.9})
    state = build_state(config, "d")
    assert state.averaged is not None
    start = next(state.model.parameters()).detach().clone()
    with torch.no_grad():
        for _ in range(200):
            next(state.model.parameters()).add_(0.01)
            state.averaged.update_parameters(state.model)
    now, mean = next(state.model.parameters()), next(state.published.parameters())
    lag = (now - mean).mean().item()
    assert 0.05 < lag < 0.12, "an average of decay 0.9 lags by 9 steps of 0.01"
    assert not torch.equal(mean, start)
    state.save(tmp_path, config, {"score": 0.0}, {})
    again = build_state(config, "d")
    again.load(tmp_path)
    assert again.averaged is not None and again.averaged.n_averaged == state.averaged.n_averaged
    assert torch.equal(next(again.model.parameters()), now)
    assert torch.equal(next(again.published.parameters()), mean)
    assert torch.equal(
        load_model(load_checkpoint(tmp_path)).state_dict()["background_head.weight"],
        again.published.state_dict()["background_head.weight"],
    )
