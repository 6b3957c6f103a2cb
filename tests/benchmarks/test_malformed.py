"""A short form of the malformed images: what must hold, holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_every_malformed_image_is_refused_and_none_ends_a_child_or_makes_the_service_grow(
    rows_of: Callable[..., dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    rows = rows_of("malformed.py", "malformed", tmp_path, "--count", "291")
    assert len(rows) == 5
    assert [row for row in rows.values() if row["holds"] is not True] == []
