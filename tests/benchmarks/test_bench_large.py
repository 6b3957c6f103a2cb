from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.timeout(300)
def test_memory_follows_a_large_images_width_and_nothing_is_left_on_the_disk(
    rows_of: Callable[..., dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    rows = rows_of("bench_large.py", "large", tmp_path, "--height", "2048")
    goals = {name: row["holds"] for name, row in rows.items() if row["goal"]}
    assert goals == {
        "large_replica_peak_over_idle": True,
        "large_replica_growth": True,
        "large_child_peak": True,
        "large_disk_peak": True,
        "large_scratch_left": True,
    }
    assert "shortened" in rows["large_replica_peak_over_idle"]["note"]
