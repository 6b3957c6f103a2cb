"""What each choice of light.yaml is worth: one thing changed at a time, trained alike, measured on val.

    python tests/benchmarks/bench_ablation.py FOLDER OUT [--steps 1000] [--only "skips off" ...]

FOLDER is as for bench-quality. OUT keeps every model and `ablation.json`; the same command again trains only what
is missing. Short runs of one seed: they order large effects, and differences under 0.3 dB mean nothing.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from quality_judge import Setting, Task, judge_all
from quality_tiles import Tiles
from train_quality import train

from kintsugi.config import load_config, with_values
from kintsugi.storage import write_atomically

ROOT = Path(__file__).resolve().parents[2]
LIGHT = ROOT / "platform" / "configs" / "light.yaml"
# Where light.yaml started; its 0.20 SSIM came of this ablation.
WEIGHTS: Mapping[str, float] = {
    "charbonnier": 0.65, "defect": 0.20, "frequency": 0.10, "ssim": 0.05, "perceptual": 0.0, "edge": 0.0, "basic": 0.0,
}  # fmt: skip
FIGURES = {
    "aligned_psnr": "PSNR",
    "aligned_ssim": "SSIM",
    "aligned_defect_psnr": "defect PSNR",
    "small_contrast_kept": "contrast kept",
    "background_invented": "invented",
}


def weights(**changed: float) -> dict[str, Any]:
    """The loss with these parts changed and the others scaled to what is left."""
    rest = sum(value for name, value in WEIGHTS.items() if name not in changed)
    scaled = {name: value * (1 - sum(changed.values())) / rest for name, value in WEIGHTS.items()}
    return {"loss.weights": {**scaled, **changed}}


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "light": {},
    "skips off": {"model.skips": "off"},
    "skips concat": {"model.skips": "concat"},
    "skips gated": {"model.skips": "gated"},
    "not residual": {"model.residual": False},
    "blocks conv": {"model.block": "conv"},
    "blocks naf": {"model.block": "naf"},
    "no attention": {"model.attention": "none", "model.attention_window": None},
    "attention over the whole input": {"model.attention_window": None},
    "attention channel and spatial": {"model.attention": "channel_spatial"},
    "biases": {"model.bias": True},
    "layer norm": {"model.norm": "layer"},
    "mask none": {"model.mask": "none", "data.mask_dropout": 0.0, "loss.mask": 0.0},
    "mask optional": {"model.mask": "optional", "loss.mask": 0.0},
    "no error bound": {"model.error": False, "loss.error": 0.0},
    "exposure undone": {"degradation.exposure": "undo"},
    "loss without defect": weights(defect=0.0),
    "loss without frequency": weights(frequency=0.0),
    "loss without SSIM": weights(ssim=0.0),
    "loss with 0.3 SSIM": weights(ssim=0.3),
    "loss with 0.15 edge": weights(edge=0.15),
    "loss L1 + MSE for Charbonnier": weights(charbonnier=0.0, basic=WEIGHTS["charbonnier"]),
    "loss without invention": {"loss.invention": 0.0},
    "no planted defects": {"data.planted": 0.0},
    "no clean images": {"degradation.presets.clean": 0.0},
    "crops anywhere": {"data.defect_crops": 0.0},
    "no averaged weights": {"optim.ema": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=60, help="of val, spread over it")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        path = options.out / f"{name}.json"
        if not path.exists():
            row = run(name, options.folder, options.out / name, options.steps, options.images)
            write_atomically(path, json.dumps(row, indent=1).encode())
        print(f"{name}: {path.read_text()}", flush=True)
    found = {name: json.loads(p.read_text()) for name in VARIANTS if (p := options.out / f"{name}.json").exists()}
    print(table(found))


def run(name: str, folder: Path, out: Path, steps: int, images: int) -> dict[str, Any]:
    """Train one variant and measure it."""
    epochs = max(1, steps // 500)
    short = {
        "data.crop": 64, "train.curriculum": [], "train.epochs": epochs, "train.patience": epochs,
        "train.steps_per_epoch": steps // epochs, "optim.restart_epochs": epochs, "train.workers": 1,
        "loss.weights": WEIGHTS,
    }  # fmt: skip
    config = with_values(load_config(LIGHT), {**short, **VARIANTS[name]})
    torch.manual_seed(config.train.seed)
    train(config, folder, out, folder.name)
    setting = Setting(folder, "val", images, {name: out / "checkpoint"}, None)
    row: dict[str, Any] = {"steps": steps, "images": images}
    for preset, where in ((None, "assigned"), ("kla", "kla")):
        tasks = [Task(index, preset, name) for index in range(len(Tiles(folder, "val", images)))]
        judged = list(judge_all(setting, tasks, 1))
        for key, label in FIGURES.items():
            row[f"{where} {label}"] = float(np.mean([j.figures[key] for j in judged if key in j.figures]))
        if preset is None:
            row["clean input"] = float(np.mean([j.clean_psnr for j in judged if j.clean_psnr is not None]))
    return row


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, the change against `light` where that was measured."""
    head = ["variant", "PSNR", "SSIM", "defect PSNR", "kla PSNR", "kla defect PSNR", "kla contrast kept",
            "kla invented", "clean input"]  # fmt: skip
    keys = ["assigned PSNR", "assigned SSIM", "assigned defect PSNR", "kla PSNR", "kla defect PSNR",
            "kla contrast kept", "kla invented", "clean input"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    base = found.get("light")
    for name, row in found.items():
        own = base is None or name == "light"
        digits = [3 if "SSIM" in key or "kept" in key or "invented" in key else 2 for key in keys]
        cells = [
            f"{row[key]:.{n}f}" if own or base is None else f"{row[key] - base[key]:+.{n}f}"
            for key, n in zip(keys, digits, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
