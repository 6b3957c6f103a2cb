"""The lines of a benchmark's answer: one figure each, printed and written as JSON."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from kintsugi.storage import write_atomically

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """One line of the answer; `holds` is None where there is no goal or no value."""

    figure: str
    value: float | None
    unit: str = ""
    goal: str | None = None
    holds: bool | None = None
    n: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, float | str | bool | None]:
        return asdict(self)


def measured(figure: str, value: float, goal: str, *, unit: str = "", n: int = 0, note: str = "") -> Row:
    """A row with a goal such as ">= 0.97" or "== 0"."""
    sign, limit = goal.split()
    holds = {">=": value >= float(limit), "<=": value <= float(limit), "==": value == float(limit)}[sign]
    return Row(figure, value, unit, goal, holds, n, note)


def print_table(rows: Iterable[Row], show: Callable[[str], None] = print) -> None:
    """All rows, one a line: figure, value, goal, note."""
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.3f}" if abs(row.value) < 10 else f"{row.value:.2f}"
        mark = {True: "holds", False: "MISSED", None: ""}[row.holds]
        show(f"{row.figure:<62} {value:>8} {row.unit:<3} {row.goal or '':<9} {mark:<7} n={row.n:<5} {row.note}")


def output_of(target: str) -> Path:
    """Where the rows of a `make` target lie."""
    return ROOT / ".kintsugi" / "bench" / f"{target}.json"


def write_rows(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps([row.to_dict() for row in rows], indent=1).encode())
