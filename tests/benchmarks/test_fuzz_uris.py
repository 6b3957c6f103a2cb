"""A short form of the fuzzing of S3 addresses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = Callable[..., dict[str, dict[str, Any]]]


def test_no_hostile_address_gets_past_the_check_where_weaker_checks_let_some_through(
    rows_of: Rows, tmp_path: Path
) -> None:
    rows = rows_of("fuzz_uris.py", "fuzz-uris", tmp_path, "--count", "2000")
    assert [row["figure"] for row in rows.values() if row["goal"] and row["holds"] is not True] == []
    assert rows["escapes: read"]["n"] == 8000
    assert rows["plain addresses of the tenant that are accepted"]["value"] == 1
