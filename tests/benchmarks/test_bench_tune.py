"""Short forms of `make bench-tune`: what must hold, holds; what is timed is not judged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Rows = Callable[..., dict[str, dict[str, Any]]]


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_search_whose_driver_and_a_worker_are_killed_ends_as_if_nothing_had_been(
    rows_of: Rows, tmp_path: Path
) -> None:
    rows = rows_of("bench_tune.py", "tune", tmp_path, "--only", "kills", "--kills", "2")
    assert [row["figure"] for row in rows.values() if row["holds"] is not True] == []
    assert rows["search: kills that hit a running process"]["note"] == "1 driver, 1 worker"
