"""Memory and time of a restoration, and how far tiles of different sizes disagree.

    .venv/bin/python tests/benchmarks/bench_restore.py --model FOLDER --height 1024

Prints its rows and writes them to .kintsugi/bench/restore.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kintsugi.imaging import Image
from kintsugi.restore.files import restore_file
from kintsugi.restore.restorer import Restorer, RestoreSettings, shipped_weights
from kintsugi.restore.strips import write_strips
from kintsugi.storage import write_atomically

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / ".kintsugi/bench/restore.json"
SIDE = 8192
THREADS = 2
TILES = (512, 256, 128)
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: the shipped weights")
    parser.add_argument("--height", type=int, default=SIDE, help="rows of the large image; fewer shorten the run")
    parser.add_argument("--tile", type=int, default=RestoreSettings().tile)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    if options.stream:
        stream(options.stream, options)
        return 0
    rows = [time_row(options), tile_row(options), device_row(options), *memory_rows(options)]
    for row in rows:
        value = "-" if row["value"] is None else f"{row['value']:.3g}"
        print(f"{row['figure']:34} {value:>10} {row['unit']:10} goal {row['goal']}  {row['note']}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(OUTPUT, json.dumps(rows, indent=1).encode())
    return 1 if any(row["holds"] is False for row in rows) else 0


def load(options: argparse.Namespace, device: str = "cpu", **settings: Any) -> tuple[Restorer, str]:
    """The restorer, and which weights it has."""
    chosen = RestoreSettings(**{"tile": options.tile, "abstain": False, **settings})
    folder = options.model or shipped_weights()
    return Restorer.from_checkpoint(folder, settings=chosen, device=device), folder.name


def time_row(options: argparse.Namespace) -> Row:
    """Median time of the model's pass of 256 x 256 px."""
    restorer, weights = load(options)
    batch = torch.rand(1, restorer.model.config.channels, 256, 256).contiguous(memory_format=torch.channels_last)
    times: list[float] = []
    with torch.inference_mode():
        restorer.model(batch)
        for _ in range(options.repeats):
            start = time.perf_counter()
            restorer.model(batch)
            times.append(1000 * (time.perf_counter() - start))
    note = f"{weights}; {THREADS} threads, median; fastest {min(times):.0f} ms"
    return row("restore_256_ms", statistics.median(times), "ms", 250, len(times), note)


def tile_row(options: argparse.Namespace) -> Row:
    """The largest difference at any pixel between tiles of several sizes and the whole image."""
    image = Image(np.concatenate([band.pixels for band in scene(640, 640)]), "tiff", 65535)
    results: list[np.ndarray] = []
    weights = ""
    for tile in (2048, *TILES):
        restorer, weights = load(options, tile=tile)
        results.append(restorer.restore(image).image.pixels.astype(np.float64) / 257)
    worst = max(float(np.abs(tiled - results[0]).max()) for tiled in results[1:])
    note = f"{weights}; tiles {', '.join(map(str, TILES))} px against the whole 640 x 640"
    return row("restore_tile_difference", worst, "of 255", 1, len(TILES), note)


def device_row(options: argparse.Namespace) -> Row:
    """The largest difference of a 16-bit result between CPU and GPU."""
    if not torch.cuda.is_available():
        return row("restore_cpu_gpu_difference", None, "of 1", 1e-4, 0, "not measured: this machine has no GPU")
    image = Image(np.concatenate([band.pixels for band in scene(640, 640)]), "tiff", 65535)
    results = [load(options, device)[0].restore(image).image.pixels.astype(np.float64) for device in ("cpu", "cuda")]
    worst = float(np.abs(results[0] - results[1]).max()) / 65535
    return row("restore_cpu_gpu_difference", worst, "of 1", 1e-4, 1, torch.cuda.get_device_name())


def memory_rows(options: argparse.Namespace) -> list[Row]:
    """Peak memory of a process of its own that restores a 16-bit grey line-scan TIFF."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "in.tiff"
        like = next(scene(1, SIDE))
        write_strips(source, like, options.height, scene(options.height, SIDE))
        words = [sys.executable, __file__, "--stream", str(source), "--tile", str(options.tile)]
        if options.model:
            words += ["--model", str(options.model)]
        told = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    shape = f"{SIDE} x {options.height} px, tile {options.tile}, {told['weights']}"
    note = shape if options.height >= SIDE else f"{shape}; shortened from {SIDE} rows"
    return [
        row("restore_8k_peak_memory", told["peak_gb"], "GB", 1.2, 1, note),
        row("restore_8k_per_megapixel", told["seconds"] / (SIDE * options.height / 1e6), "s", None, 1, note),
    ]


def stream(source: Path, options: argparse.Namespace) -> None:
    restorer, weights = load(options)
    start = time.perf_counter()
    restore_file(restorer, source, source.with_name("out.tiff"))
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_gb": peak_memory() / 1e9, "seconds": seconds, "weights": weights}))


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # Linux carries ru_maxrss over an exec: a child's would be no less than its parent's.
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def scene(height: int, width: int) -> Iterator[Image]:
    """Bands of a noisy 16-bit weave with bright and dark parts."""
    dice, columns = np.random.default_rng(0), np.arange(width)
    for top in range(0, height, 256):
        rows = np.arange(top, min(top + 256, height))[:, None]
        values = 0.5 + 0.2 * np.sin(columns / 7) * np.cos(rows / 11) + 0.2 * np.sign(np.sin(columns / 301 + rows / 473))
        noisy = values + dice.normal(0, 0.05, values.shape)
        yield Image(np.rint(np.clip(noisy, 0, 1) * 65535).astype(np.uint16), "tiff", 65535)


def row(figure: str, value: float | None, unit: str, goal: float | None, count: int, note: str) -> Row:
    holds = None if goal is None or value is None else value <= goal
    return {"figure": figure, "value": value, "unit": unit, "goal": goal, "holds": holds, "n": count, "note": note}


if __name__ == "__main__":
    sys.exit(main())
