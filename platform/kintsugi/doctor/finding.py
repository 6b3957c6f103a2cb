"""What a check tells."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from kintsugi.errors import KintsugiError

State = Literal["ok", "note", "warning", "problem"]


class Finding(BaseModel):
    """What one check saw. `mend` says what to do about a warning or a problem; a note needs nothing."""

    model_config = ConfigDict(frozen=True)

    about: str
    state: State
    tells: str
    mend: str = ""


def from_error(about: str, error: KintsugiError) -> Finding:
    """A problem in the words of the error, whose sentence ends in what to do."""
    tells, _, mend = str(error).rpartition(": ")
    return Finding(about=about, state="problem", tells=tells or mend, mend=mend if tells else "")


def ok(about: str, tells: str) -> Finding:
    return Finding(about=about, state="ok", tells=tells)


def note(about: str, tells: str) -> Finding:
    return Finding(about=about, state="note", tells=tells)


def warning(about: str, tells: str, mend: str) -> Finding:
    return Finding(about=about, state="warning", tells=tells, mend=mend)


def problem(about: str, tells: str, mend: str) -> Finding:
    return Finding(about=about, state="problem", tells=tells, mend=mend)
