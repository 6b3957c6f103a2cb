"""What training costs on a GPU: images a second, memory, waiting for data; runs without Ray.

The published recipe's model at full size on crops of 256 px: plain float32 (no TF32, no channels_last, no fused
optimizer) against what `platform/configs` set by default, and against those with `train.compile`. Without a GPU the
rows say so.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rows import Row, measured, output_of, print_table, write_rows
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.data.dataset import build_dataset, open_split
from kintsugi.data.loader import Crops, build_train_loader
from kintsugi.data.synthetic import write_synthetic
from kintsugi.losses import build_loss
from kintsugi.models import PerceptualDistance
from kintsugi.storage import LocalStore
from kintsugi.training import loop
from kintsugi.training.loop import Worker
from kintsugi.training.state import build_state

ROOT = Path(__file__).parents[2]
VALUES = {
    "data.dataset": "bench", "degradation.use_given": False, "train.workers": 1, "train.gpu": True,
    "loss.perceptual.weights": "random",
}  # fmt: skip
PLAIN = "plain float32"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {"train.precision": "fp32"},
    "defaults": {},
    "defaults, compiled": {"train.compile": True},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench-train-gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of each way, after 10 to warm up")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--loaders", type=int, default=12, help="processes that make crops")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--device", default="cuda", help="cpu: to try the script, its rows have no goal")
    parser.add_argument("--output", type=Path, default=output_of("bench-train-gpu"))
    options = parser.parse_args(arguments)
    rows = _rows(options) if options.device == "cpu" or torch.cuda.is_available() else [_absent()]
    print_table(rows)
    write_rows(rows, options.output)
    return int(any(row.holds is False for row in rows))


def _absent() -> Row:
    return Row("training on a GPU", None, note="not measured: this machine has no GPU")


def _rows(options: argparse.Namespace) -> list[Row]:
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    values = {**VALUES, "data.batch_size": options.batch, "data.crop": options.crop}
    values |= {"data.loader_processes": options.loaders, "train.steps_per_epoch": 3 + options.steps}
    config = with_values(load_config(ROOT / "platform/configs/seed.yaml"), values)
    batch = _random_batch(config, device)
    speeds: dict[str, float] = {}
    rows: list[Row] = []
    for way, changed in WAYS.items():
        run = _Run(with_values(config, changed), device, plain=way == PLAIN)
        speeds[way], peak = run.speed(batch, options.steps)
        note = f"{name}, torch {torch.__version__}, batch {options.batch} of {options.crop} px"
        rows.append(Row(f"{way}: images a second", speeds[way], n=options.steps, note=note))
        rows.append(Row(f"{way}: peak memory", peak, "GB", n=options.steps))
    ratio = speeds["defaults"] / speeds[PLAIN]
    rows.append(measured("speed of the defaults, of plain float32", ratio, ">= 3", n=options.steps, note=name))
    rate, chip = speeds["defaults"] * _flops(config, batch), _product_rate(device)
    note = f"{rate / 1e12:.3g} of {chip / 1e12:.3g} TFLOP/s that the product of two bf16 matrices reaches"
    rows.append(Row("share of the chip's measured bf16 rate", rate / chip, n=options.steps, note=note))
    return [*rows, _waiting(config, device)]


class _Run:
    """Steps of the product's own loop, one after the other."""

    def __init__(self, config: ExperimentConfig, device: torch.device, *, plain: bool = False) -> None:
        self.config, self.device = config, device
        self.state = build_state(config, "0" * 64, device)
        model: nn.Module = self.state.model
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not plain
        if plain:
            model = _Contiguous(self.state.model.to(memory_format=torch.contiguous_format))
            self.state.optimizer = AdamW(self.state.model.parameters(), foreach=False)
        if config.train.compile:
            model = cast(nn.Module, torch.compile(model))
        loss = build_loss(config.loss, PerceptualDistance(config.loss.perceptual)).to(device)
        self.epochs = loop._Epochs(loss, model.train(), Worker(device=device), None, math.inf, loop._Timer(None))

    def step(self, batch: Crops) -> Tensor:
        return self.epochs._step(self.state, self.config, [0], iter([batch]))

    def speed(self, batch: Crops, steps: int) -> tuple[float, float]:
        """Images a second, and the peak of the memory that torch took, in GB."""
        for _ in range(10):
            self.step(batch)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = _now(self.device)
        for _ in range(steps):
            self.step(batch)
        seconds = _now(self.device) - started
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else math.nan
        return steps * len(batch.clean) / seconds, peak


class _Contiguous(nn.Module):
    """Undoes the loop's channels_last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, mask: Tensor, known: Tensor) -> Any:
        return self.model(image.contiguous(), mask, known)


def _random_batch(config: ExperimentConfig, device: torch.device) -> Crops:
    size, count, generator = config.data.crop, config.data.batch_size, torch.Generator().manual_seed(0)
    clean = torch.rand(count, config.model.channels, size, size, generator=generator)
    mask = (torch.rand(count, 1, size, size, generator=generator) < 0.02).float()
    degraded = (clean + 0.1 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    ones = torch.ones(count)
    return Crops(*(part.to(device) for part in (degraded, clean, mask, ones, ones, ones)))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _flops(config: ExperimentConfig, batch: Crops) -> float:
    """Floating-point operations of a step of training, for one image: forward, backward and loss."""
    run = _Run(with_values(config, {"train.precision": "fp32"}), batch.clean.device)
    with FlopCounterMode(display=False) as counter:
        run.step(batch)
    return counter.get_total_flops() / len(batch.clean)


def _product_rate(device: torch.device) -> float:
    side, turns = (8192, 20) if device.type == "cuda" else (512, 2)
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    left @ left
    started = _now(device)
    for _ in range(turns):
        left @ left
    return turns * 2 * side**3 / (_now(device) - started)


def _waiting(config: ExperimentConfig, device: torch.device) -> Row:
    """The share of an epoch that the loop waits for its loader, after the first batch."""
    with tempfile.TemporaryDirectory(prefix="kintsugi-bench-") as scratch:
        store = LocalStore(Path(scratch) / "store")
        store.root.mkdir()
        side = config.data.crop + 64
        build_dataset("pairs", write_synthetic(Path(scratch) / "images", parts=40, size=side), "bench", store)
        reader = open_split(store, "bench", "train", Path(scratch) / "cache")
        run, waited = _Run(config, device), 0.0
        batches = iter(build_train_loader(reader, config, epoch=0))
        for _ in range(3):
            run.step(next(batches))
        started = before = _now(device)
        for batch in batches:
            waited += time.perf_counter() - before
            run.step(batch)
            before = _now(device)
        share = waited / (before - started)
    note = f"{config.data.loader_processes} loader processes, crops of {config.data.crop} px"
    steps = (config.train.steps_per_epoch or 0) - 3
    return measured("share of the time that the GPU waits for data", share, "<= 0.03", n=steps, note=note)


if __name__ == "__main__":
    sys.exit(main())
