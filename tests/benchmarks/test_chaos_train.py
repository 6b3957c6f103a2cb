"""Short forms of `make chaos-train` and `make bench-train`: what must hold, holds; what is timed is not judged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Rows = Callable[..., dict[str, dict[str, Any]]]


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_worker_a_node_and_a_driver_are_killed_and_the_run_ends_as_if_nothing_had_been(
    rows_of: Rows, tmp_path: Path
) -> None:
    rows = rows_of("chaos_train.py", "chaos", tmp_path, "--only", "kills", "--kills", "3")
    assert [row["figure"] for row in rows.values() if row["holds"] is not True] == []
    assert rows["kills that hit a running process"]["note"] == "1 worker, 1 node, 1 driver"


def test_writers_that_are_killed_leave_nothing_torn_where_a_naive_copy_does(rows_of: Rows, tmp_path: Path) -> None:
    rows = rows_of("chaos_train.py", "chaos", tmp_path, "--only", "writers", "--writers", "6")
    assert len(rows) == 4
    assert [row["figure"] for row in rows.values() if row["holds"] is not True] == []


def test_without_a_gpu_the_benchmark_of_one_says_so_and_its_steps_run(rows_of: Rows, tmp_path: Path) -> None:
    words = ("--device", "cpu", "--steps", "1", "--batch", "1", "--crop", "32", "--loaders", "0")
    rows = rows_of("bench_train_gpu.py", "gpu", tmp_path, *words)
    assert rows["defaults: images a second"]["value"] > 0
    assert 0 <= rows["share of the time that the GPU waits for data"]["value"] <= 1
