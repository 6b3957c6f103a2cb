"""Short forms of `make chaos-train` and `make bench-train`: what must hold, holds; what is timed is not judged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def rows_of(script: str, target: str, folder: Path, *words: str) -> dict[str, dict[str, Any]]:
    output = folder / f"{target}.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), *words, "--output", str(output)]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    return {row["figure"]: row for row in json.loads(output.read_text())}


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_worker_a_node_and_a_driver_are_killed_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    rows = rows_of("chaos_train.py", "chaos", tmp_path, "--only", "kills", "--kills", "3")
    assert [row["figure"] for row in rows.values() if row["holds"] is not True] == []
    assert rows["kills that hit a running process"]["note"] == "1 worker, 1 node, 1 driver"


def test_writers_that_are_killed_leave_nothing_torn_where_a_naive_copy_does(tmp_path: Path) -> None:
    rows = rows_of("chaos_train.py", "chaos", tmp_path, "--only", "writers", "--writers", "6")
    assert len(rows) == 4
    assert [row["figure"] for row in rows.values() if row["holds"] is not True] == []


def test_without_a_gpu_the_benchmark_of_one_says_so_and_its_steps_run(tmp_path: Path) -> None:
    words = ("--device", "cpu", "--steps", "1", "--batch", "1", "--crop", "32", "--loaders", "0")
    rows = rows_of("bench_train_gpu.py", "gpu", tmp_path, *words)
    assert rows["defaults: images a second"]["value"] > 0
    assert 0 <= rows["share of the time that the GPU waits for data"]["value"] <= 1
