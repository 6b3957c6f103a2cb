"""Benchmarks are run as their users run them, as scripts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def rows_of() -> Callable[..., dict[str, dict[str, Any]]]:
    """Runs a script with words and reads its rows by figure."""

    def run(script: str, target: str, folder: Path, *words: str) -> dict[str, dict[str, Any]]:
        output = folder / f"{target}.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / script), *words, "--output", str(output)]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
        return {row["figure"]: row for row in json.loads(output.read_text())}

    return run
