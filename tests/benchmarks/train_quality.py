"""Train one model of the quality table in this process, without a cluster; the same command again continues.

    python tests/benchmarks/train_quality.py platform/configs/light.yaml FOLDER OUT [--set key=value ...]

FOLDER is read in the `pairs` layout. OUT gets `checkpoint/`, the one with the highest score, `log.jsonl` with a
line for each epoch, and `latest/`, from which an interrupted run goes on. At the end `published/` is what
`tests/benchmarks/checkpoints` keeps: the best weights in half precision, without the training state, calibrated.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from kintsugi.checkpoint import load_checkpoint, load_model, save_checkpoint
from kintsugi.config import ExperimentConfig, load_config
from kintsugi.data.dataset import SplitReader, build_dataset, open_split
from kintsugi.evaluation.calibration import calibrate_model
from kintsugi.losses import build_loss
from kintsugi.models import PerceptualDistance
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import LocalStore
from kintsugi.training.loop import fit
from kintsugi.training.state import TrainState, build_state
from kintsugi.trust.report import save_calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--init", type=Path, help="a checkpoint folder whose weights a new run starts from")
    parser.add_argument("--trained-on", default="", help="told in the checkpoint's card")
    options = parser.parse_args()
    config = load_config(options.config, [*options.sets, "train.workers=1"])
    train_split, val = train(
        config, options.folder, options.out, options.trained_on or options.folder.name, options.init
    )
    _publish(options.out / "checkpoint", options.out / "published", config, train_split, val)


def train(
    config: ExperimentConfig, folder: Path, out: Path, trained_on: str, init: Path | None = None
) -> tuple[SplitReader, SplitReader]:
    """Train in this process, from `out/latest` where that is; the splits that it used."""
    torch.set_num_threads(config.train.threads)
    store = LocalStore(out / "store")
    ref = build_dataset("pairs", folder, "quality", store).ref
    cache = out / "cache"
    train, val = (open_split(store, ref, split, cache) for split in ("train", "val"))
    state = build_state(config, train.digest)
    if (out / "latest").exists():
        state.load(out / "latest")
    elif init is not None:
        state.start_from(load_checkpoint(init))
    started, before = time.monotonic(), _seconds(out)
    earlier = load_checkpoint(init).card if init is not None else {}
    card = {
        "trained_on": trained_on,
        "steps_before": earlier.get("steps", 0),
        "dataset_digest": train.digest,
        "threads": config.train.threads,
    }

    def report(metrics: Mapping[str, float], state: TrainState) -> None:
        seconds = before + time.monotonic() - started
        row = {**metrics, "seconds": seconds}
        about = {**card, "wall_seconds": round(seconds), "steps": state.epoch * (config.train.steps_per_epoch or 0)}
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        _replace(out / "latest", lambda folder: state.save(folder, config, metrics, about))
        if state.stale == 0:
            _replace(out / "checkpoint", lambda folder: state.save(folder, config, metrics, about))
        print({name: round(value, 4) for name, value in row.items()}, flush=True)

    perceptual = PerceptualDistance(config.loss.perceptual) if config.loss.weights.perceptual > 0 else None
    fit(state, config, train, val, build_loss(config.loss, perceptual), report)
    return train, val


def _publish(source: Path, folder: Path, config: ExperimentConfig, train: SplitReader, val: SplitReader) -> None:
    best = load_checkpoint(source)
    save_checkpoint(folder, load_model(best).half(), config, best.metrics, best.card)
    save_calibration(folder, calibrate_model(Restorer.from_checkpoint(folder), val, train, config))


def _seconds(out: Path) -> float:
    log = out / "log.jsonl"
    return float(json.loads(log.read_text().splitlines()[-1])["seconds"]) if log.exists() else 0.0


def _replace(folder: Path, write) -> None:
    fresh = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(fresh, ignore_errors=True)
    write(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


if __name__ == "__main__":
    main()
