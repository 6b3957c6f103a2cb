"""Fit a model's alarm, error bound and abstention to held-out data, once its training is done."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kintsugi.config import ExperimentConfig
from kintsugi.data.dataset import SplitReader
from kintsugi.data.loader import evaluation_pair
from kintsugi.metrics import align
from kintsugi.restore.restorer import Restorer
from kintsugi.trust.judge import InputProfile, Trust, Unit, calibrate, conformal_scale, fit_profile, judge
from kintsugi.trust.report import Calibration

FALSE_ALARMS = 0.03
"""Share of good restorations that may raise the alarm on held-out images; new ones raise a little more."""
LEAST_INPUTS = 64
"""With fewer images than this a profile would take ordinary inputs for unfamiliar ones."""

PIXELS = 1 << 18
"""Drawn from each image for the error scale: hundreds of large images would not fit into memory."""
_NO_MAP = np.zeros((0, 0), np.float32)


def calibrate_model(
    restorer: Restorer, val: SplitReader, train: SplitReader, config: ExperimentConfig, *, limit: int = 256
) -> Calibration:
    """Limits and error scale from the validation images, the profile of known inputs from the training images.

    Args:
        limit: at most so many images of each split, spread over it.
    """
    bare = replace(restorer, calibration=Calibration())
    trusts: list[Trust] = []
    bounds: list[Unit] = []
    errors: list[Unit] = []
    parts: list[str] = []
    for index in _spread(len(val), limit):
        sample = val.sample(index)
        degraded, clean, mask = evaluation_pair(sample, config)
        restored = bare.restore(degraded, mask if config.model.mask == "given" else None)
        output = restored.image.to_unit()
        trusts.append(replace(judge(degraded.to_unit(), output), suspicion=_NO_MAP))
        parts.append(sample.part_id)
        if restored.error_bound is not None:
            # The output has the input's exposure, or another one that nobody can know.
            error = np.abs(output - align(clean.to_unit(), output))
            chosen = _drawn(restored.error_bound.size, index)
            errors.append((error if error.ndim == 2 else error.max(2)).ravel()[chosen])
            bounds.append(restored.error_bound.ravel()[chosen])
    scale = conformal_scale(bounds, errors, parts, coverage=config.loss.error_quantile) if bounds else 1.0
    limits = calibrate(trusts, parts, target_false_alarm=FALSE_ALARMS)
    return Calibration(limits=limits, profile=_profile(train, config, limit), error_scale=scale)


def _profile(train: SplitReader, config: ExperimentConfig, limit: int) -> InputProfile | None:
    pairs = [evaluation_pair(train.sample(index), config) for index in _spread(len(train), limit)]
    if len(pairs) < LEAST_INPUTS:
        return None
    return fit_profile([pair[0].to_unit() for pair in pairs], [pair[1].to_unit() for pair in pairs])


def _drawn(pixels: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).choice(pixels, min(pixels, PIXELS), replace=False, shuffle=False)


def _spread(count: int, limit: int) -> list[int]:
    taken = min(count, limit)
    return [place * count // taken for place in range(taken)]
