"""make bench-train: what Ray and the cache cost a training, as ratios measured in one run.

The same loop runs on two processes under `torchrun` and under Ray Train, in turn; the loader passes over a split in
the local cache and over the same bytes held in memory, in turn. `bench_train_gpu.py` holds what needs a GPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import torch
import train_trace
from rows import Row, measured, output_of, print_table, write_rows
from train_cluster import ray_head

from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.data.dataset import SplitReader, build_dataset, open_split
from kintsugi.data.loader import build_train_loader
from kintsugi.data.sample import RawSample
from kintsugi.data.synthetic import write_synthetic
from kintsugi.storage import LocalStore

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VALUES = {
    "data.dataset": "bench", "data.crop": 96, "degradation.use_given": False, "train.workers": 2,
    "train.cpus_per_worker": 1, "train.validation_images": 2,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench-train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=2, help="of each kind of run, alternating")
    parser.add_argument("--steps", type=int, default=40, help="in each of the 3 epochs of a run")
    parser.add_argument("--output", type=Path, default=output_of("bench-train"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kintsugi-bench-") as scratch:
        store = LocalStore(Path(scratch) / "store")
        store.root.mkdir()
        build_dataset("pairs", write_synthetic(Path(scratch) / "images", parts=40, size=192), "bench", store)
        os.environ["KINTSUGI_CACHE"] = str(Path(scratch) / "cache")
        values = {**VALUES, "train.epochs": 3, "train.steps_per_epoch": options.steps}
        config = with_values(load_config(ROOT / "platform/configs/demo.yaml"), values)
        rows = [cache_row(store, config, options.turns), ray_row(store, config, Path(scratch), options.turns)]
    print_table(rows)
    write_rows(rows, options.output)
    return int(any(row.holds is False for row in rows))


# ------------------------------------------------------------------------------- Ray


def ray_row(store: LocalStore, config: ExperimentConfig, scratch: Path, turns: int) -> Row:
    path = scratch / "config.yaml"
    path.write_text(config.to_yaml())
    os.environ |= {"OMP_NUM_THREADS": "1"}
    kinds = {
        "torchrun": [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"],
        "ray": [sys.executable],
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    # torchrun runs beside the idle cluster, which costs next to nothing.
    with ray_head(2) as cluster:
        for turn in range(turns):
            for kind, start in kinds.items():
                run = f"{kind}-{turn}"
                script = "train_torchrun.py" if kind == "torchrun" else "train_driver.py"
                words = [*start, str(HERE / script), cluster.address, store.uri, run, str(path)]
                trace = scratch / f"{run}.trace"
                paths = os.pathsep.join([str(HERE), *sys.path])
                environment = {**os.environ, train_trace.VARIABLE: str(trace), "PYTHONPATH": paths}
                with (scratch / f"{run}.log").open("wb") as log:
                    done = subprocess.run(words, env=environment, check=False, stdout=log, stderr=log)
                if done.returncode:
                    raise SystemExit(f"{run} failed:\n{(scratch / f'{run}.log').read_text()[-3000:]}")
                rates[kind] += _rates(train_trace.read(trace), config)
    per_second = {kind: median(found) for kind, found in rates.items()}
    told = ", ".join(f"{kind} {value:.1f} images/s" for kind, value in per_second.items())
    note = f"2 gloo workers, crops of {config.data.crop} px; median of epochs 2 and 3 of {turns} runs: {told}"
    ratio = per_second["ray"] / per_second["torchrun"]
    return measured("speed under Ray Train, of that under torchrun", ratio, ">= 0.97", n=2 * turns, note=note)


def _rates(lines: Sequence[dict[str, Any]], config: ExperimentConfig) -> list[float]:
    """Images per second of all epochs but the first, from its first step's end to its last step's."""
    found: list[float] = []
    for epoch in range(1, config.train.epochs):
        times = [x["time"] for x in lines if x["kind"] == "step" and x["rank"] == 0 and x["epoch"] == epoch]
        found.append((len(times) - 1) * config.data.batch_size / (times[-1] - times[0]))
    return found


# ----------------------------------------------------------------------------- cache


class InMemory(SplitReader):
    """The same samples, encoded as they are, in a list."""

    def __init__(self, reader: SplitReader) -> None:
        super().__init__(reader.source)
        self._rows = [reader.raw(index) for index in range(len(reader))]

    def __len__(self) -> int:
        return len(self._rows)

    def raw(self, index: int) -> RawSample:
        return self._rows[index]


def cache_row(store: LocalStore, config: ExperimentConfig, turns: int) -> Row:
    torch.set_num_threads(1)
    reader = open_split(store, "bench", "train")
    kinds = {"memory": InMemory(reader), "cache": reader}
    ratios: list[float] = []
    cv2.setNumThreads(1)
    _pass(reader, config, 0)
    for turn in range(4 * turns):
        order = list(kinds) if turn % 2 else list(reversed(kinds))
        seconds = {kind: _pass(kinds[kind], config, turn) for kind in order}
        ratios.append(seconds["memory"] / seconds["cache"])
    images = (config.train.steps_per_epoch or 0) * config.data.batch_size
    note = f"crops of {config.data.crop} px read, decoded and degraded in one process; median of {len(ratios)} pairs"
    return measured(
        "loader's speed from the local cache, of that from memory", median(ratios), ">= 0.98", n=images, note=note
    )


def _pass(reader: SplitReader, config: ExperimentConfig, epoch: int) -> float:
    """Seconds of this process's own: the loader works in it, and others on the machine are left out."""
    started = time.process_time()
    for _ in build_train_loader(reader, config, epoch=epoch):
        pass
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(main())
