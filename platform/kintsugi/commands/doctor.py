"""kintsugi doctor."""

from collections import Counter
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kintsugi import local
from kintsugi.commands.console import Json, print_json, say
from kintsugi.doctor import Finding, examine
from kintsugi.doctor.finding import from_error
from kintsugi.errors import StackError

STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "problem": "bold red"}


def doctor(as_json: Json = False) -> None:
    """Say what is open, missing or old, and how to mend it; exit code 1 if anything is a problem."""
    untold, findings = _activated(), examine()
    findings += [finding for finding in untold if finding.tells not in {found.tells for found in findings}]
    problems = sum(finding.state == "problem" for finding in findings)
    if as_json:
        print_json({"problems": problems, "findings": [finding.model_dump() for finding in findings]})
    else:
        _print(findings)
    if problems:
        raise typer.Exit(1)


def _activated() -> list[Finding]:
    """The local stack's variables are used as every other verb uses them."""
    try:
        local.activate(local.home_folder())
    except StackError as error:
        return [from_error("record", error)]
    return []


def _print(findings: Sequence[Finding]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.tells)
        if finding.mend:
            text.append(f"\nmend: {finding.mend}", "bold")
        table.add_row(Text(finding.state, STYLES[finding.state]), finding.about, text)
    Console().print(table)
    say(_summary(findings))


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.state for finding in findings)
    told = [f"{counts[state]} {state}{'s' * (counts[state] > 1)}" for state in ("problem", "warning") if counts[state]]
    return ", ".join(told) or "nothing is open, missing or old"
