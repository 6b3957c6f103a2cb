"""Short forms of `make bench-serve`: what must hold, holds; what is timed is not judged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Rows = Callable[..., dict[str, dict[str, Any]]]


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_an_overloaded_service_answers_every_request_and_tells_the_refused_when_to_come_back(
    rows_of: Rows, tmp_path: Path
) -> None:
    rows = rows_of("bench_serve.py", "serve", tmp_path, "--only", "overload", "--overload-seconds", "4")
    assert rows["requests under overload with another answer, or none"]["value"] == 0
    assert rows["refusals with Retry-After"]["holds"] is True
