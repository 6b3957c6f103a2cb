from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import ExperimentConfig, with_values
from kintsugi.data.dataset import open_split
from kintsugi.data.loader import evaluation_pair
from kintsugi.evaluation import calibration
from kintsugi.evaluation.calibration import calibrate_model
from kintsugi.models import build_model
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import LocalStore
from kintsugi.trust.report import Calibration, save_calibration


@pytest.fixture
def config(tiny_config: ExperimentConfig) -> ExperimentConfig:
    return with_values(tiny_config, {"model.error": True, "loss.error": 0.5})


@pytest.fixture
def restorer(config: ExperimentConfig) -> Restorer:
    torch.manual_seed(0)
    return Restorer(build_model(config.model).eval())


def test_the_limit_lets_the_restorations_it_was_fitted_to_pass(
    tiny_store: LocalStore, config: ExperimentConfig, restorer: Restorer
) -> None:
    val, train = open_split(tiny_store, "tiny", "val"), open_split(tiny_store, "tiny", "train")
    found = calibrate_model(restorer, val, train, config)
    calibrated = replace(restorer, calibration=found)
    reports = [calibrated.restore(evaluation_pair(val.sample(i), config)[0]).report for i in range(len(val))]
    assert not any(report.alarm for report in reports)
    assert max(report.alarm_score for report in reports) == pytest.approx(found.limits.max_alarm_score, rel=1e-3)


def test_the_scaled_error_bound_holds_for_the_share_of_pixels_that_was_asked_for(
    tiny_store: LocalStore, config: ExperimentConfig, restorer: Restorer
) -> None:
    val, train = open_split(tiny_store, "tiny", "val"), open_split(tiny_store, "tiny", "train")
    found = calibrate_model(restorer, val, train, config)
    degraded, clean, _ = evaluation_pair(val.sample(0), config)
    bound = replace(restorer, calibration=found).restore(degraded).error_bound
    assert bound is not None and found.error_scale != 1.0
    inside = np.abs(degraded.to_unit() - clean.to_unit()) <= bound
    assert inside.mean() >= config.loss.error_quantile


def test_few_images_give_no_profile_and_many_do(
    tiny_store: LocalStore, config: ExperimentConfig, restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    val, train = open_split(tiny_store, "tiny", "val"), open_split(tiny_store, "tiny", "train")
    assert calibrate_model(restorer, val, train, config).profile is None
    monkeypatch.setattr(calibration, "LEAST_INPUTS", 4)
    assert calibrate_model(restorer, val, train, config).profile is not None


def test_the_calibration_travels_with_the_checkpoint(
    tmp_path: Path, tiny_store: LocalStore, config: ExperimentConfig, restorer: Restorer
) -> None:
    val, train = open_split(tiny_store, "tiny", "val"), open_split(tiny_store, "tiny", "train")
    save_checkpoint(tmp_path, restorer.model, config, {"score": 0.0}, {})
    assert Restorer.from_checkpoint(tmp_path).calibration == Calibration()
    found = calibrate_model(Restorer.from_checkpoint(tmp_path), val, train, config)
    save_calibration(tmp_path, found)
    assert Restorer.from_checkpoint(tmp_path).calibration == found != Calibration()
