"""What every verb shares: its options, and how it prints."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]
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
    """One document on one line, the last of standard output."""
    sys.stdout.write(json.dumps(document) + "\n")


def print_table(columns: tuple[str, ...], rows: Any) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
