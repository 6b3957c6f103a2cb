"""The short form of `make chaos-serve`: what must hold, holds; what is timed is not judged."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GET_NGINX = [Path(__file__).parents[2] / "infra/get-debian", "nginx", "nginx"]
Rows = Callable[..., dict[str, dict[str, Any]]]


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_service_that_is_killed_spoilt_and_starved_loses_doubles_and_alters_nothing(
    rows_of: Rows, tmp_path: Path
) -> None:
    if subprocess.run(GET_NGINX, capture_output=True, check=False).returncode:
        pytest.skip("there is no nginx: run 'make nginx', or install it")
    few = {"requests": 300, "every": 2, "rollouts": 3, "away": 5, "malformed": 120, "replicas": 2}
    rows = rows_of("chaos_serve.py", "chaos", tmp_path, *(f"--{name}={value}" for name, value in few.items()))
    judged = [row for row in rows.values() if row["holds"] is not None and row["unit"] != "s"]
    assert len(judged) == 12
    assert [(row["figure"], row["value"], row["note"]) for row in judged if not row["holds"]] == []
