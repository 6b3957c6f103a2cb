"""What every verb shares: its options, and how it prints."""

import contextlib
import json
import sys
from collections.abc import Generator
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from kintsugi import cluster

_documents: ContextVar[TextIO | None] = ContextVar("documents", default=None)


@contextlib.contextmanager
def _documents_alone() -> Generator[None]:
    """Keep standard output for documents: Ray prints there what nodes and workers write, until it is left."""
    token = _documents.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            try:
                yield
            finally:
                cluster.leave()
    finally:
        _documents.reset(token)


def _for_machines(context: typer.Context, as_json: bool) -> bool:
    if as_json and _documents.get() is None:
        context.with_resource(_documents_alone())
    return as_json


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.", callback=_for_machines)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; repeatable.")
]
Model = Annotated[str, typer.Argument(metavar="NAME[@ALIAS|@NUMBER]", help="A published model.")]


def say(text: str) -> None:
    """A result, on standard output."""
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def note(text: str) -> None:
    """Progress, on standard error."""
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)


def print_json(document: Any) -> None:
    """One document on one line, on standard output."""
    (_documents.get() or sys.stdout).write(json.dumps(document) + "\n")


def print_table(columns: tuple[str, ...], rows: Any) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
