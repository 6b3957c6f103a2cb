"""A checkpoint is one folder that alone rebuilds the model.

weights.safetensors  config.yaml  metrics.json  card.json  [train_state.pt]  manifest.json (last)
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, ValidationError
from safetensors.torch import load_file, save_file

from kintsugi.config import ExperimentConfig, load_config
from kintsugi.errors import IntegrityError, TrainingError
from kintsugi.manifest import MANIFEST, Manifest, check_file, get_folder, make_manifest
from kintsugi.models import RestorationUNet, build_model
from kintsugi.storage import ObjectStore, write_atomically

_log = logging.getLogger(__name__)

Rank = tuple[float, ...]

WEIGHTS, CONFIG, METRICS, CARD, TRAIN_STATE = (
    "weights.safetensors",
    "config.yaml",
    "metrics.json",
    "card.json",
    "train_state.pt",
)


@dataclass(frozen=True)
class Checkpoint:
    """A verified folder. `card` says how the model came to be: data digest, perceptual weights, versions."""

    folder: Path
    config: ExperimentConfig
    metrics: dict[str, float]
    card: dict[str, Any]
    digest: str


def save_checkpoint(
    folder: Path,
    model: RestorationUNet,
    config: ExperimentConfig,
    metrics: Mapping[str, float],
    card: Mapping[str, JsonValue],
    train_state: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the folder; its manifest comes last, so a torn one is never taken for whole."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(config.to_yaml())
    (folder / METRICS).write_text(json.dumps(dict(metrics), indent=1))
    (folder / CARD).write_text(json.dumps(dict(card), indent=1))
    if train_state is not None:
        torch.save(dict(train_state), folder / TRAIN_STATE)
    manifest = make_manifest(folder, "checkpoint")
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest


def load_checkpoint(folder: Path) -> Checkpoint:
    """Verify a folder against its manifest and read it.

    Raises:
        IntegrityError: no manifest, or a file that differs from it.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise IntegrityError(f"{folder} has no readable {MANIFEST}: it is no finished checkpoint") from error
    for name, entry in manifest.files.items():
        check_file(folder / name, entry, str(folder / name))
    missing = {WEIGHTS, CONFIG, METRICS, CARD} - manifest.files.keys()
    if missing:
        raise IntegrityError(f"{folder} holds no {', '.join(sorted(missing))}: it is no checkpoint of a model")
    return Checkpoint(
        folder=folder,
        config=load_config(folder / CONFIG),
        metrics=json.loads((folder / METRICS).read_text()),
        card=json.loads((folder / CARD).read_text()),
        digest=manifest.digest,
    )


def load_model(checkpoint: Checkpoint, device: str | torch.device = "cpu") -> RestorationUNet:
    """The model in evaluation mode."""
    model = build_model(checkpoint.config.model)
    load_weights(model, checkpoint)
    return model.to(device).eval()


def load_weights(model: RestorationUNet, checkpoint: Checkpoint) -> None:
    try:
        model.load_state_dict(load_file(checkpoint.folder / WEIGHTS))
    except (RuntimeError, ValueError) as error:
        raise IntegrityError(
            f"{checkpoint.folder}: the weights do not fit the model of its config ({error})"
        ) from error


def load_train_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `save_checkpoint` was given as `train_state`; tensors and plain values only."""
    return torch.load(checkpoint.folder / TRAIN_STATE, map_location="cpu", weights_only=True)


def fetch_best(store: ObjectStore, run: str, folder: Path) -> Checkpoint:
    """Download the run's checkpoint with the highest `score`; a damaged one gives way to the next best.

    Raises:
        TrainingError: the run has no whole checkpoint.
    """
    if _fetch_first(store, run, folder, _by_score) is None:
        raise TrainingError(_no_checkpoint(store, run))
    return load_checkpoint(folder)


def best_metrics(store: ObjectStore, run: str) -> dict[str, float]:
    """The metrics of the run's checkpoint with the highest `score`.

    Raises:
        TrainingError: the run has no checkpoint.
    """
    ranked = _ranked(store, run, _by_score)
    if not ranked:
        raise TrainingError(_no_checkpoint(store, run))
    return ranked[0][1]


def fetch_newest(store: ObjectStore, run: str, folder: Path) -> str | None:
    """Download the run's whole checkpoint with the highest `epoch`, and within it the highest `step`.

    Returns:
        Its prefix in the store; None where the run has no whole checkpoint yet.
    """
    return _fetch_first(store, run, folder, _by_time)


def newest_metrics(store: ObjectStore, run: str) -> dict[str, float] | None:
    """The metrics of the run's newest checkpoint; None where there is none yet."""
    ranked = _ranked(store, run, _by_time)
    return ranked[0][1] if ranked else None


def _by_score(metrics: Mapping[str, float]) -> Rank:
    return (metrics.get("score", -math.inf),)


def _by_time(metrics: Mapping[str, float]) -> Rank:
    return metrics["epoch"], metrics.get("step", 0)


def _no_checkpoint(store: ObjectStore, run: str) -> str:
    return f"run {run} has no whole checkpoint under {store.uri}/runs/{run}/: start it again"


def delete_torn(store: ObjectStore, run: str) -> list[str]:
    """Delete what was uploaded of checkpoints whose manifest never came; their prefixes.

    Only while nobody else writes to the run.
    """
    keys = [info.key for info in store.list(f"runs/{run}/checkpoint_")]
    prefixes = {"/".join(key.split("/")[: 2 + run.count("/") + 1]) for key in keys}
    torn = sorted(prefix for prefix in prefixes if f"{prefix}/{MANIFEST}" not in keys)
    for key in keys:
        if key.startswith(tuple(f"{prefix}/" for prefix in torn)):
            store.delete(key)
    return torn


def _fetch_first(store: ObjectStore, run: str, folder: Path, rank: Callable[[Mapping[str, float]], Rank]) -> str | None:
    for key, _ in _ranked(store, run, rank):
        try:
            get_folder(store, key, folder)
            load_checkpoint(folder)
        except IntegrityError as error:
            _log.warning("%s: trying the next checkpoint", error)
        else:
            return key
    return None


def _ranked(
    store: ObjectStore, run: str, rank: Callable[[Mapping[str, float]], Rank]
) -> list[tuple[str, dict[str, float]]]:
    """Prefixes and metrics of the run's checkpoints whose upload ended, the highest rank first."""
    keys = {info.key for info in store.list(f"runs/{run}/")}
    found = [key.removesuffix(f"/{MANIFEST}") for key in keys if key.endswith(f"/{MANIFEST}")]
    told = [(key, json.loads(store.get(f"{key}/{METRICS}"))) for key in found if f"{key}/{METRICS}" in keys]
    return sorted(told, key=lambda entry: (rank(entry[1]), entry[0]), reverse=True)
