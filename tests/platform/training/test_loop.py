from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kintsugi.config import ExperimentConfig, with_values
from kintsugi.data.dataset import open_split
from kintsugi.errors import TrainingError
from kintsugi.losses import RestorationLoss, build_loss
from kintsugi.models import PerceptualDistance
from kintsugi.storage import LocalStore
from kintsugi.training.loop import Pictures, Worker, _cut, fit
from kintsugi.training.state import TrainState, build_state

Reported = list[tuple[dict[str, float], dict[str, torch.Tensor]]]


def loss_of(config: ExperimentConfig) -> RestorationLoss:
    return build_loss(config.loss, PerceptualDistance(config.loss.perceptual))


def run(
    store: LocalStore,
    config: ExperimentConfig,
    state: TrainState | None = None,
    save: Callable[[TrainState], None] | None = None,
) -> tuple[Reported, TrainState]:
    train, val = open_split(store, "tiny", "train"), open_split(store, "tiny", "val")
    state = state or build_state(config, train.digest)
    reported: Reported = []
    how: dict[str, Any] = {} if save is None else {"save": save}

    def report(metrics: Mapping[str, float], now: TrainState) -> None:
        reported.append((dict(metrics), {k: v.clone() for k, v in now.model.state_dict().items()}))

    fit(state, config, train, val, loss_of(config), report, **how)
    return reported, state


def test_training_lowers_the_loss_and_beats_the_degraded_images(
    tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    reported, _ = run(tiny_store, with_values(tiny_config, {"train.epochs": 4, "train.steps_per_epoch": 15}))
    losses = [metrics["loss/total"] for metrics, _ in reported]
    assert losses[-1] < 0.8 * losses[0]
    assert reported[-1][0]["score"] > 1.0


def test_every_loss_part_and_both_gains_are_reported(tiny_store: LocalStore, tiny_config: ExperimentConfig) -> None:
    (metrics, _), *_ = run(tiny_store, tiny_config)[0]
    parts = {f"loss/{name}" for name in ("defect", "ssim", "perceptual", "edge", "basic", "total")}
    assert parts | {"val/psnr_gain", "val/defect_psnr_gain", "score", "epoch", "learning_rate"} <= metrics.keys()
    assert metrics["score"] == min(metrics["val/psnr_gain"], metrics["val/defect_psnr_gain"])


def test_a_resumed_run_gives_the_very_same_losses_and_weights(
    tmp_path: Path, tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    config = with_values(tiny_config, {"train.epochs": 3})
    straight, _ = run(tiny_store, config)
    _, halfway = run(tiny_store, with_values(config, {"train.epochs": 1}))
    halfway.save(tmp_path, config, {"score": 0.0}, {})
    torch.manual_seed(999)
    state = build_state(with_values(config, {"train.seed": 77}), halfway.dataset_digest)
    state.load(tmp_path)
    resumed, _ = run(tiny_store, config, state)
    assert [metrics for metrics, _ in resumed] == [metrics for metrics, _ in straight[1:]]
    for name, value in straight[-1][1].items():
        assert torch.equal(value, resumed[-1][1][name]), name


def test_a_run_stopped_at_any_step_gives_the_very_same_losses_and_weights(
    tmp_path: Path, tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    values = {"train.epochs": 2, "train.steps_per_epoch": 4, "train.checkpoint_steps": 1, "optim.ema": 0.9}
    config = with_values(tiny_config, {**values, "train.micro_batches": 2, "model.dropout": 0.2})
    kept: list[tuple[int, int]] = []

    def save(state: TrainState) -> None:
        kept.append((state.epoch, state.step))
        state.save(tmp_path / f"{state.epoch}-{state.step}", config, {}, {})

    straight, _ = run(tiny_store, config, save=save)
    assert kept == [(epoch, step) for epoch in (0, 1) for step in (1, 2, 3)]
    for epoch, step in kept:
        torch.manual_seed(999)
        state = build_state(with_values(config, {"train.seed": 77}), open_split(tiny_store, "tiny", "train").digest)
        state.load(tmp_path / f"{epoch}-{step}")
        resumed, _ = run(tiny_store, config, state)
        assert [metrics for metrics, _ in resumed] == [metrics for metrics, _ in straight[epoch:]]
        for name, value in straight[-1][1].items():
            assert torch.equal(value, resumed[-1][1][name]), name


def test_micro_batches_change_no_sample_and_hardly_a_loss(
    tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    whole, parts = (
        run(tiny_store, with_values(tiny_config, {"train.epochs": 1, "model.dropout": 0.0, "train.micro_batches": n}))
        for n in (1, 4)
    )
    for name, value in whole[0][0][0].items():
        if name != "loss/defect":  # a mean over the mask's pixels, of which parts of a batch hold unequal shares
            assert parts[0][0][0][name] == pytest.approx(value, rel=0.02, abs=0.02), name


def test_time_that_is_up_ends_the_run_with_a_checkpoint_within_the_epoch(
    tmp_path: Path, tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    values = {"train.steps_per_epoch": 9, "train.checkpoint_steps": 2, "train.max_minutes": 1e-9}
    config = with_values(tiny_config, values)
    reported, state = run(tiny_store, config, save=lambda now: now.save(tmp_path, config, {}, {}))
    assert not reported and (state.epoch, state.step) == (0, 2)
    fresh = build_state(config, state.dataset_digest)
    fresh.load(tmp_path)
    assert (fresh.epoch, fresh.step) == (0, 2)


def test_a_process_that_will_be_taken_away_saves_at_once(tiny_store: LocalStore, tiny_config: ExperimentConfig) -> None:
    train, val = open_split(tiny_store, "tiny", "train"), open_split(tiny_store, "tiny", "val")
    config = with_values(tiny_config, {"train.epochs": 1, "train.steps_per_epoch": 21})
    state, saved = build_state(config, train.digest), []
    worker = Worker(urgent=lambda: state.step < 20)
    fit(
        state, config, train, val, loss_of(config), lambda *_: None,
        save=lambda now: saved.append(now.step), worker=worker,
    )  # fmt: skip
    assert saved == [10]


def test_after_each_epoch_some_validation_images_are_shown_as_they_are(
    tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    train, val = open_split(tiny_store, "tiny", "train"), open_split(tiny_store, "tiny", "val")
    shown: list[tuple[int, Pictures]] = []
    state = build_state(tiny_config, train.digest)
    loss = loss_of(tiny_config)
    fit(state, tiny_config, train, val, loss, lambda *_: None, show=lambda rows, epoch: shown.append((epoch, rows)))
    assert [epoch for epoch, _ in shown] == [1, 2]
    for _, rows in shown:
        assert len(rows) == len(val) == 2
        for index, (degraded, restored, clean) in enumerate(rows):
            assert np.array_equal(clean, val.sample(index).clean.to_unit())
            assert degraded.shape == restored.shape == clean.shape and not np.array_equal(degraded, restored)


def test_of_a_large_image_a_window_around_its_defect_is_shown() -> None:
    mask = np.zeros((900, 2000), bool)
    mask[880:890, 1000:1010] = True
    image = np.arange(mask.size, dtype=np.float32).reshape(mask.shape)
    (window,) = _cut(mask, image)
    assert np.array_equal(window, image[-256:, 1000 - 128 : 1000 + 128])
    (window,) = _cut(np.zeros_like(mask), image)
    assert np.array_equal(window, image[450 - 128 : 450 + 128, 1000 - 128 : 1000 + 128])


def test_a_save_is_due_when_the_last_one_is_long_ago(tiny_store: LocalStore, tiny_config: ExperimentConfig) -> None:
    values = {"train.epochs": 1, "train.steps_per_epoch": 21}
    saved: dict[float | None, list[int]] = {}
    for minutes in (None, 1e-9, 1e9):
        config, steps = with_values(tiny_config, {**values, "train.checkpoint_minutes": minutes}), list[int]()
        run(tiny_store, config, save=lambda state, steps=steps: steps.append(state.step))
        saved[minutes] = steps
    assert saved == {None: [], 1e-9: [10, 20], 1e9: []}


def test_bf16_trains_much_as_float32(tiny_store: LocalStore, tiny_config: ExperimentConfig) -> None:
    config = with_values(tiny_config, {"train.epochs": 1})
    plain = run(tiny_store, config)[0][0][0]["loss/total"]
    half = run(tiny_store, with_values(config, {"train.precision": "bf16"}))[0][0][0]["loss/total"]
    assert half != plain and half == pytest.approx(plain, rel=0.05)


def test_it_stops_when_patience_runs_out(tiny_store: LocalStore, tiny_config: ExperimentConfig) -> None:
    config = with_values(
        tiny_config,
        {"train.epochs": 9, "train.patience": 2, "optim.learning_rate": 1e-12, "optim.min_learning_rate": 0.0},
    )
    reported, state = run(tiny_store, config)
    assert len(reported) == state.epoch == 3
    assert state.stale == 2


def test_a_loss_that_is_not_finite_stops_the_run(tiny_store: LocalStore, tiny_config: ExperimentConfig) -> None:
    state = build_state(tiny_config, open_split(tiny_store, "tiny", "train").digest)
    state.model.background_head.bias.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="no longer finite"):
        run(tiny_store, tiny_config, state)


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    config = with_values(tiny_config, {"train.epochs": 1})
    first, again = (run(tiny_store, config)[0][0][0] for _ in range(2))
    other = run(tiny_store, with_values(config, {"train.seed": 1}))[0][0][0]
    assert first == again
    assert first["loss/total"] != other["loss/total"]


def test_an_averaged_model_resumes_exactly_too(
    tmp_path: Path, tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    config = with_values(tiny_config, {"train.epochs": 2, "optim.ema": 0.9})
    straight, _ = run(tiny_store, config)
    _, halfway = run(tiny_store, with_values(config, {"train.epochs": 1}))
    halfway.save(tmp_path, config, {"score": 0.0}, {})
    state = build_state(config, halfway.dataset_digest)
    state.load(tmp_path)
    resumed, _ = run(tiny_store, config, state)
    assert [metrics for metrics, _ in resumed] == [metrics for metrics, _ in straight[1:]]


def test_a_model_with_defect_map_error_bound_and_curriculum_trains(
    tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    values = {
        "model.mask": "predicted",
        "model.error": True,
        "loss.mask": 0.1,
        "loss.error": 0.5,
        "loss.invention": 1.0,
        "data.planted": 0.5,
        "degradation.exposure": "keep",
        "degradation.use_given": False,
        "degradation.presets": {"kla": 1, "lowlight": 1, "clean": 0.2},
        "train.curriculum": [{"epochs": 1, "values": {"data.crop": 16}}],
    }
    reported, state = run(tiny_store, with_values(tiny_config, values))
    assert {"loss/mask", "loss/error", "loss/invention"} <= reported[0][0].keys()
    prediction = state.model(torch.rand(1, 1, 24, 40))
    assert prediction.defect is not None and prediction.error is not None
    assert prediction.defect.shape == prediction.error.shape == (1, 1, 24, 40)
    assert prediction.error.min() >= 0
