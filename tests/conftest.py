"""What every room's tests share."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"```(\w*)")
MARK = re.compile(r'<!-- (?:"([^"]+)" )?(run|not run|saved)(?: (by|with|as) (.+?)|: (.+?))? -->')


@pytest.fixture
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def _no_ambient_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test must not meet the store or the credentials of whoever runs it."""
    for name in ("KINTSUGI_STORE", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


@dataclass(frozen=True)
class Mark:
    """What becomes of a block of a page, or of its lines that begin with `of`; in the page a comment above the block.

    `<!-- run -->`, `<!-- run with FOLDER -> drawn; ID -> 7 -->`, `<!-- run by tests/serve/test_keys.py -->`,
    `<!-- not run: WHY -->`, and each of them for some lines: `<!-- "ray up" not run: WHY -->`.
    `<!-- saved as keys.yaml -->` is of a file that is shown, for the lines below it.
    """

    of: str | None
    fate: str
    by: tuple[Path, ...] = ()
    instead: tuple[tuple[str, str], ...] = ()
    name: str = ""
    why: str = ""

    def is_run(self) -> bool:
        """As it stands on its page, by the test of the pages or by one of its own."""
        return self.fate == "run" or any(path.suffix != ".md" for path in self.by)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the marks above it."""

    path: Path
    line: int
    language: str
    text: str
    marks: tuple[Mark, ...]

    @property
    def page(self) -> str:
        return self.path.name

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """Its command lines, as they stand; one that goes on in the next line is one."""
        if self.language == "python":
            return [self.text]
        joined = self.text.replace("\\\n", "\\\0").splitlines()
        lines = [line.replace("\\\0", "\\\n") for line in joined]
        return [line for line in lines if line.strip() and not line.startswith("#")]

    def mark(self, command: str) -> Mark | None:
        """The mark of a line: its own, or the block's."""
        own = [mark for mark in self.marks if mark.of is not None and command.startswith(mark.of)]
        return next(iter([*own, *(mark for mark in self.marks if mark.of is None)]), None)


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page, in its order."""
    lines = page.read_text().splitlines()
    above: list[Mark] = []
    inside: tuple[int, str, tuple[Mark, ...]] | None = None
    for number, line in enumerate(lines, 1):
        fence = FENCE.fullmatch(line)
        if inside is not None and fence:
            begun, language, marks = inside
            yield Block(page, begun, language, "\n".join(lines[begun : number - 1]), marks)
            inside, above = None, []
        elif fence:
            inside = (number, fence[1], tuple(above))
        elif inside is None:
            above = [*above, read_mark(line)] if line.startswith("<!--") else []


def read_mark(line: str) -> Mark:
    """Raises ValueError where the comment is no mark."""
    found = MARK.fullmatch(line)
    if found is None:
        raise ValueError(f"is no mark: {line}")
    of, fate, how, what, why = found.groups()
    parts = (what or "").split("; ")
    if how == "by":
        return Mark(of, "run by", by=tuple(ROOT / part for part in parts))
    if how == "as":
        return Mark(of, "saved", name=parts[0])
    swaps = [part.partition(" -> ") for part in parts] if how else []
    return Mark(of, fate, instead=tuple((before, after) for before, _, after in swaps), why=why or "")


@pytest.fixture(scope="session")
def read_page() -> Callable[[Path], Iterator[Block]]:
    """The blocks of a page."""
    return blocks_of


@pytest.fixture(scope="session")
def pages() -> list[Path]:
    """The pages that users read."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "infra").rglob("README.md"))]


@pytest.fixture(scope="session")
def blocks(pages: list[Path]) -> list[Block]:
    """Every fenced block of every page."""
    return [block for page in pages for block in blocks_of(page)]
