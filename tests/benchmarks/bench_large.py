"""Memory and disk that a line-scan image takes on its way through a replica, from store to store.

    .venv/bin/python tests/benchmarks/bench_large.py --height 5120

The model answers with what it is given, so that the time is that of everything around it: fetching, hashing, unpacking
in a child, tiling, the report, packing, keeping. Prints its rows and writes them to .kintsugi/bench/large.json.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
from rows import ROOT, Row, measured, output_of, print_table, write_rows

from kintsugi.imaging import Image
from kintsugi.restore.strips import write_strips
from kintsugi.storage import LocalStore

WIDTH, HEIGHT = 8192, 51200
SHORT = 8
"""The shorter image, by which memory that grows with the height would show, has so many times fewer rows."""
SAMPLE_S = 0.02
MB = 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=HEIGHT, help="rows of the image; fewer shorten the run")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8)
    parser.add_argument("--output", type=Path, default=output_of("large"))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        print(json.dumps(asyncio.run(restore(options.work))))
        return 0
    heights = max(1024, options.height // SHORT), options.height
    short, tall = (run(height, options.bits) for height in heights)
    rows = told(short, tall, heights, options)
    print_table(rows)
    write_rows(rows, options.output)
    return 1 if any(row.holds is False for row in rows) else 0


def told(short: dict[str, float], tall: dict[str, float], heights: tuple[int, int], options: Any) -> list[Row]:
    shape = f"{WIDTH} x {heights[1]} px of {options.bits} bits, {tall['bytes'] / MB:.0f} MB"
    note = shape if heights[1] >= HEIGHT else f"{shape}; shortened from {HEIGHT} rows"
    over, growth = tall["replica"] - tall["idle"], tall["replica"] - short["replica"]
    rows = f"from {heights[0]} to {heights[1]} rows"
    return [
        measured("large_replica_peak_over_idle", over, "<= 300", unit="MB", n=1, note=note),
        Row("large_replica_peak", tall["replica"], "MB", n=1, note=f"of which {tall['idle']:.0f} MB before the image"),
        measured("large_replica_growth", growth, "<= 100", unit="MB", n=2, note=rows),
        measured("large_child_peak", tall["child"], "<= 200", unit="MB", n=1, note="of what reads the TIFF"),
        measured("large_disk_peak", tall["disk"] / tall["bytes"], "<= 2.05", n=1, note="of the file, in scratch"),
        measured("large_scratch_left", tall["left"], "== 0", unit="B", n=1),
        Row("large_seconds", tall["seconds"], "s", n=1, note="the model answers with what it is given"),
        Row("large_again_seconds", tall["again"], "s", n=1, note="the same question: the kept result is found"),
    ]  # fmt: skip


def run(height: int, bits: int) -> dict[str, float]:
    """Restore an image of that height in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="kintsugi-large-") as folder:
        (Path(folder) / "in").mkdir()
        dtype = np.uint8 if bits == 8 else np.uint16
        source = Path(folder) / "in" / "web.tif"
        write_strips(source, next(scene(1, dtype)), height, scene(height, dtype))
        paths = os.pathsep.join(str(ROOT / room) for room in ("platform", "tune", "serve"))
        environment = {**os.environ, "KINTSUGI_CACHE": str(Path(folder) / "cache"), "PYTHONPATH": paths}
        words = [sys.executable, __file__, "--work", folder]
        done = subprocess.run(words, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        return {**json.loads(done.stdout.splitlines()[-1]), "bytes": source.stat().st_size}


def scene(height: int, dtype: type[np.unsignedinteger]) -> Iterator[Image]:
    """Bands of a noisy weave, stored as they are."""
    top, columns = int(np.iinfo(dtype).max), np.arange(WIDTH)
    noise = np.random.default_rng(0).normal(0, 0.03 * top, (256, WIDTH))
    for start in range(0, height, 256):
        lines = np.arange(start, min(start + 256, height))[:, None]
        values = top * (0.5 + 0.2 * np.sin(columns / 7) * np.cos(lines / 11)) + noise[: len(lines)]
        pixels = np.clip(values, 0, top).astype(dtype)
        yield Image(pixels, "tiff", top, (("compression", "none"), ("photometric", "minisblack")))


async def restore(folder: Path) -> dict[str, float]:
    """What a replica does with the image in the store at `folder`, in this process."""
    from kintsugi_serve.access.addresses import S3Address
    from kintsugi_serve.jobs import LargeAnswer, LargeJob
    from kintsugi_serve.replica.replica import Replica
    from kintsugi_serve.schemas import Settings

    settings = Settings(store="s3://bench/store", follow_s=0, threads=2)
    replica = Replica(settings, shelving=lambda load: load, source=Same(), open_root=lambda _: LocalStore(folder))
    await replica.reconfigure({"model": "same@1"})
    job = LargeJob("local", S3Address("s3://bench/store", "in/web.tif"), budget_s=3600)
    idle, scratch = memory()[1], folder / "cache" / "scratch"
    with watched(scratch) as seen:
        started = time.perf_counter()
        answer = await replica.restore_large(job)
        seconds = time.perf_counter() - started
    assert isinstance(answer, LargeAnswer), answer
    started = time.perf_counter()
    again = await replica.restore_large(job)
    assert isinstance(again, LargeAnswer) and not again.created and again.facts == answer.facts
    return {
        "idle": idle / MB, "replica": memory()[0] / MB, "child": seen["child"] / MB, "disk": seen["disk"],
        "left": float(sum(size_of(path) for path in scratch.rglob("*"))),
        "seconds": seconds, "again": time.perf_counter() - started,
    }  # fmt: skip


class Same:
    """A source of one model, which answers with what it is given."""

    def find(self, reference: str) -> Any:
        return SimpleNamespace(ref="same@1", name="same", number=1, digest="0" * 64)

    def load(self, version: Any) -> Any:
        from kintsugi.config import ExperimentConfig, with_values
        from kintsugi.models import Prediction, RestorationUNet
        from kintsugi.restore.restorer import Restorer
        from kintsugi_serve.jobs import LoadedModel
        from kintsugi_serve.replica.serving import Loaded

        class Identity(RestorationUNet):
            def forward(self, image: Any, mask: Any = None) -> Prediction:
                return Prediction(image, None, None)

        tiny = {"model.levels": 1, "model.blocks": 1, "model.base": 4, "model.skips": [True], "model.reduction": [2]}
        tiny |= {"model.mask": "none", "loss.mask": 0.0, "model.channels": 1}
        config = with_values(ExperimentConfig(), tiny)
        return Loaded(Restorer(Identity(config.model).eval()), LoadedModel("same", 1, "0" * 64))

    def fallbacks(self, reference: str) -> Sequence[Any]:
        return ()

    def keep(self, reference: str, version: Any) -> None:
        """It is always there."""


@contextlib.contextmanager
def watched(scratch: Path) -> Iterator[dict[str, float]]:
    """The largest memory of any process below this one, and what was on the disk at most, in bytes."""
    seen, done = {"child": 0.0, "disk": 0.0}, threading.Event()

    def look() -> None:
        while not done.wait(SAMPLE_S):
            peaks = [memory(child.pid)[0] for child in psutil.Process().children(recursive=True)]
            seen["child"] = max(seen["child"], *peaks, 0)
            seen["disk"] = max(seen["disk"], sum(size_of(path) for path in scratch.rglob("*")))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def memory(pid: int | str = "self") -> tuple[int, int]:
    """Peak and present resident bytes of a process; 0 of one that is gone."""
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024
    return 0, 0


def size_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size if path.is_file() else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
