"""A search for the person who watches: a table in a terminal, elsewhere a line for each trial that ends."""

import sys
import time
from collections.abc import Callable, Container
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Column, Table

from kintsugi_tune.front import pareto_front
from kintsugi_tune.ledger import Ledger
from kintsugi_tune.record import METRICS, SearchRecord, TrialRecord
from kintsugi_tune.values import UNITS, values_told

_ROWS = 20
_EVERY_S = 1.0


class Live:
    """Follows a ledger.

    Args:
        deadline: of `time.monotonic()`, when the search will be stopped.
        also: is told what is known by now, as often as the person is.
    """

    def __init__(
        self,
        ledger: Ledger,
        deadline: float | None,
        console: Console | None = None,
        also: Callable[[SearchRecord], None] | None = None,
    ) -> None:
        self._ledger, self._deadline, self._also = ledger, deadline, also
        self._console = console or Console(stderr=True)
        self._table = RichLive(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._told: set[tuple[int, bool]] = set()
        self._shown = 0.0

    def show(self) -> None:
        if time.monotonic() - self._shown < _EVERY_S:
            return
        self._shown = time.monotonic()
        record = self._ledger.record()
        if self._also is not None:
            self._also(record)
        for trial in record.trials:
            if (trial.state != "running" and not trial.screened) or trial.state in ("failed", "pruned"):
                self._tell(trial, record)
        if self._table is not None:
            self._table.update(search_table(record, self._left(record)), refresh=True)

    def _tell(self, trial: TrialRecord, record: SearchRecord) -> None:
        end = (trial.number, trial.screened)  # what survives screening ends twice
        if end not in self._told and self._table is None:
            sys.stderr.write(f"{record.name} trial {trial.number:3d} {ending(trial, record)}\n")
        self._told.add(end)

    def _left(self, record: SearchRecord) -> float | None:
        allowed = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        wanted = seconds_wanted(record)
        return min((left for left in (allowed, wanted) if left is not None), default=None)

    def __enter__(self) -> Self:
        if self._table is not None:
            self._table.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._shown = 0.0
        self.show()
        if self._table is not None:
            self._table.__exit__(kind, error, at)


def search_table(record: SearchRecord, seconds_left: float | None) -> Table:
    """The last trials, those under way at the foot; members of the front are marked with a star."""
    front = {trial.number for trial in pareto_front(record.trials)}
    ended = sum(trial.state != "running" for trial in record.trials)
    left = "" if seconds_left is None else f", {seconds_left / 60:.0f} min left"
    title = f"{record.name}: {ended} of {record.config.search.trials} trials ended{left}"
    heads = ("", "trial", "state", "epochs", *(UNITS[name] for name in record.objectives))
    # One line for each trial, whose config ends where the terminal does.
    columns = (*(Column(head, no_wrap=True) for head in heads), Column("config", no_wrap=True, ratio=1))
    table = Table(*columns, title=title, title_justify="left", box=None, expand=True)
    for trial in _shown(record, front):
        told = trial.state if trial.label is None else f"{trial.state} ({trial.label})"
        mark = "*" if trial.number in front else ""
        figures = [_figure(trial, name) for name in record.objectives]
        table.add_row(mark, str(trial.number), told, _epochs(trial, record), *figures, readable(trial))
    return table


def _shown(record: SearchRecord, front: Container[int]) -> list[TrialRecord]:
    """The front, then the last to end, those under way at the foot; as many as a terminal has lines for."""
    best = [trial for trial in record.trials if trial.number in front]
    others = [trial for trial in record.trials if trial.number not in front]
    latest = sorted(others, key=lambda trial: (trial.state == "running", trial.number))
    return [*best, *latest[-max(1, _ROWS - len(best)) :]]


def seconds_wanted(record: SearchRecord) -> float | None:
    """What the rest will take if its epochs take as long as those so far; None before a trial has ended."""
    search, ended = record.config.search, [t for t in record.trials if t.started and t.ended and t.epochs]
    spent = sum((trial.ended - trial.started).total_seconds() for trial in ended if trial.started and trial.ended)
    epochs = sum(trial.epochs for trial in ended)
    if not epochs:
        return None
    survivors = -(-search.screened // search.reduction_factor)
    full = (search.trials - search.screened) * search.epochs + survivors * (search.epochs - search.screen_epochs)
    # Half of what screening may cost: most of its trials are stopped.
    wanted = full + search.screened * search.screen_epochs / 2
    return max(0.0, wanted - epochs) * spent / epochs / search.max_concurrent


def ending(trial: TrialRecord, record: SearchRecord) -> str:
    """What became of a trial by now, in one line."""
    if trial.state == "failed":
        return f"failed after {trial.epochs} epochs: {trial.reason}"
    figures = "  ".join(f"{name} {_figure(trial, name)} dB" for name in record.objectives)
    screened = trial.screened and trial.epochs >= record.config.search.screen_epochs
    what = {"complete": "complete", "running": "under way"}.get(trial.state, "screened" if screened else "stopped")
    return f"{what} after {trial.epochs} epochs  {figures}  {readable(trial)}"


def readable(trial: TrialRecord) -> str:
    """Its values on one line."""
    return "; ".join(values_told(trial))


def _figure(trial: TrialRecord, name: str) -> str:
    value = trial.best.get(METRICS[name])
    return "-" if value is None else f"{value:.2f}"


def _epochs(trial: TrialRecord, record: SearchRecord) -> str:
    search = record.config.search
    return f"{trial.epochs}/{search.screen_epochs if trial.screened else search.epochs}"
