"""Every command of every page is run by a test, or says why it cannot be; and all name what is there."""

import re
import shlex
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression

from kintsugi.cli import COMMANDS, resolve
from kintsugi.config import ExperimentConfig, load_config

ROOT = Path(__file__).parents[1]
DATA = {"text", "csv", "yaml", "json"}
"""Of a block that is shown and not typed."""
REASONS = re.compile(
    r"needs (?:an account on AWS|Kubernetes|a Docker engine|a GPU|root|TensorRT|OpenVINO|Grafana)"
    r"|takes many minutes; a short form is run by (tests/\S+\.py)"
)
PROGRAMS = re.compile(
    r"(?:[A-Z_]+=\S* )*(?:kintsugi|make|pytest|python|ray|curl|kubectl|docker|aws|pip|export|\.venv/|infra/)"
)
INLINE = re.compile(r"`([^`\n]+)`")
SETTING = r"`(?:--set )?\b((?:data|degradation|model|loss|optim|train|search)\.[a-z_.]*[a-z])(?==|`)"
LEFT_OUT = re.compile(r"\.{3}|…")


def typed(blocks: Any) -> list[Any]:
    return [block for block in blocks if block.language not in DATA]


def test_every_command_is_run_or_says_why_not(blocks: Any) -> None:
    unmarked = [
        f"{block.place}: {command}"
        for block in typed(blocks)
        for command in block.commands()
        if block.mark(command) is None
    ]
    assert unmarked == []


def test_what_is_shown_only_is_no_command(blocks: Any) -> None:
    assert {block.language for block in typed(blocks)} <= {"", "python"}
    shown = [block for block in blocks if block.language in DATA]
    assert [block.place for block in shown if PROGRAMS.match(block.text)] == []


def test_a_mark_is_of_something(blocks: Any) -> None:
    idle = [
        f"{block.place}: {mark.of}"
        for block in blocks
        for mark in block.marks
        if mark not in [block.mark(command) for command in block.commands()]
    ]
    assert idle == []


def test_what_is_not_run_has_one_of_few_reasons(blocks: Any) -> None:
    """That it is tedious is none of them."""
    marks = [(block.place, mark) for block in blocks for mark in block.marks if mark.fate == "not run"]
    told = [(place, mark, REASONS.fullmatch(mark.why)) for place, mark in marks]
    assert [f"{place}: {mark.why}" for place, mark, reason in told if reason is None] == []
    assert [reason[1] for *_, reason in told if reason and reason[1] and not (ROOT / reason[1]).is_file()] == []


def test_who_is_said_to_run_a_command_does_so(blocks: Any) -> None:
    lines = [(block, line, block.mark(line)) for block in typed(blocks) for line in block.commands()]
    said = [(block, line, path) for block, line, mark in lines if mark for path in mark.by]
    # What a page has from another page, that one runs, or a test does.
    firsthand = [(block, line) for block, line, mark in lines if mark and mark.is_run() and block.language == ""]
    known = {(block.path, *words_of(line)) for block, line in firsthand}
    assert len(said) > 50
    assert [
        f"{block.place}: {line}: {path}"
        for block, line, path in said
        if not ((path, *words_of(line)) in known if path.suffix == ".md" else names(path, block, line))
    ] == []


def names(path: Path, block: Any, command: str) -> bool:
    """Whether a test reads the page, or calls the program and the verb."""
    if not path.is_file():
        return False
    text = path.read_text()
    if block.page in text or block.language == "python":
        return block.page in text
    program, *words = words_of(command)
    if program == "make":
        return re.search(rf"\b{words[0]}\b", text) is not None
    if program != "kintsugi":
        return all(re.search(rf"""["/ ]{re.escape(Path(word).name)}["' ]""", text) for word in (program, *words[:1]))
    verb = split_verb(words)[0]
    quoted = r",\s*".join(f'"{word}"' for word in verb.split())
    return re.search(rf"{quoted}|\bkintsugi {verb}\b", text) is not None


def words_of(command: str) -> list[str]:
    """A command line without the variables before it, its comment, and the folder of its program."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    while re.match(r"[A-Z_]+=|time$", words[0]):
        words = words[1:]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def split_verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb of a line of `kintsugi`, and what follows it."""
    for length in (2, 1):
        if " ".join(words[:length]) in COMMANDS:
            return " ".join(words[:length]), words[length:]
    raise AssertionError(f"kintsugi {' '.join(words)}: no such verb")


@pytest.fixture(scope="session")
def command_of() -> Callable[[str], Any]:
    """The parser of a verb."""
    import typer
    from typer.main import get_command

    def made(verb: str) -> Any:
        app = typer.Typer(add_completion=False)
        app.command()(resolve(COMMANDS[verb][0]))
        return get_command(app)

    return made


def test_every_line_of_kintsugi_is_one_that_its_parser_takes(blocks: Any, command_of: Callable[[str], Any]) -> None:
    lines = [words for block in typed(blocks) for line in block.commands() for words in verbs_of(block, line)]
    assert len(lines) > 40
    for verb, rest in lines:
        command_of(verb).make_context(verb, list(rest))


def verbs_of(block: Any, line: str) -> list[tuple[str, list[str]]]:
    """The verb of a line and what follows it; of `kintsugi submit -- VERB` both."""
    words = [] if block.language == "python" else words_of(line)
    if words[:1] != ["kintsugi"] or words[1:] == ["--version"]:
        return []
    verb, rest = split_verb(words[1:])
    if verb != "submit" or "--raw" in rest:
        return [(verb, rest)]
    return [(verb, rest), split_verb(rest[rest.index("--") + 1 :])]


def test_every_config_and_setting_in_a_line_is_there(blocks: Any) -> None:
    lines = [words for block in typed(blocks) for line in block.commands() for words in verbs_of(block, line)]
    taken = [(verb, rest) for verb, rest in lines if verb == "train" or (verb == "tune" and "--config" in rest)]
    assert len(taken) > 5
    for verb, rest in taken:
        config = rest[0] if verb == "train" else rest[rest.index("--config") + 1]
        load_config(ROOT / config, [value for option, value in pairwise(rest) if option == "--set"])


def test_every_setting_in_a_sentence_is_there(pages: list[Path]) -> None:
    named = {key for page in pages for key in re.findall(SETTING, page.read_text())}
    assert len(named) > 20
    assert [key for key in sorted(named) if not is_setting(ExperimentConfig, key.split("."))] == []


def is_setting(section: Any, path: list[str]) -> bool:
    field = section.model_fields.get(path[0])
    if field is None or len(path) == 1:
        return field is not None
    return not hasattr(field.annotation, "model_fields") or is_setting(field.annotation, path[1:])


def inline(pages: list[Path]) -> list[str]:
    """Commands within a page's sentences and tables."""
    prose = [re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL) for page in pages]
    return [found for text in prose for found in INLINE.findall(text) if PROGRAMS.match(found)]


def test_every_verb_and_option_in_a_sentence_is_there(pages: list[Path], command_of: Callable[[str], Any]) -> None:
    found = [words[1:] for text in inline(pages) if (words := words_of(LEFT_OUT.sub("", text)))[0] == "kintsugi"]
    assert len(found) > 30
    for words in [words for words in found if words and not words[0].startswith("-")]:
        verb, rest = split_verb(words)
        if "--" not in rest:
            known = {option for parameter in command_of(verb).params for option in parameter.opts} | {"--help"}
            assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, words


def test_every_target_of_make_in_the_pages_is_there(pages: list[Path], blocks: Any) -> None:
    commands = [*inline(pages), *(command for block in typed(blocks) for command in block.commands())]
    called = {target for text in commands for target in re.findall(r"^make ([a-z-]+)", text)}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert len(called) > 10 and called - targets == set()


def test_every_option_of_a_script_in_the_pages_is_there(pages: list[Path]) -> None:
    calls = [words_of(text)[1:] for text in inline(pages) if re.match(r"python \S+/", text)]
    assert len(calls) > 5
    for script, *rest in calls:
        text = (ROOT / script).read_text()
        assert [w for w in rest if w.startswith("--") and f'"{w.partition("=")[0]}"' not in text] == [], script


@pytest.fixture(scope="session")
def known_tests() -> dict[Path, list[str]]:
    """The names of the tests of each file."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return {path: re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE) for path in files}


def test_every_call_of_pytest_in_the_pages_selects_a_test(
    pages: list[Path], known_tests: dict[Path, list[str]]
) -> None:
    calls = [words[1:] for text in inline(pages) if (words := words_of(text))[0] == "pytest"]
    assert len(calls) > 40
    assert [call for call in calls if not selected(call, known_tests)] == []


def selected(call: list[str], tests: dict[Path, list[str]]) -> bool:
    """Whether each path of the call exists, and some of their tests match its -k."""
    paths = [ROOT / word for word in call if word.startswith("tests/")]
    within = [path for path in tests if any(path.is_relative_to(asked) for asked in paths)]
    if not paths or not all(path.exists() for path in paths):
        return False
    wanted = Expression.compile(call[call.index("-k") + 1] if "-k" in call else "test")
    named = [[test, *path.relative_to(ROOT).parts] for path in within for test in tests[path]]
    return any(wanted.evaluate(partial(matches, names)) for names in named)


def matches(names: list[str], word: str) -> bool:
    return any(word.lower() in name.lower() for name in names)


@pytest.mark.parametrize(
    ("page", "check"),
    [
        ("```\nkintsugi up\n```", test_every_command_is_run_or_says_why_not),
        ('<!-- "kintsugi up" run -->\n```\nkintsugi up\nkintsugi down\n```', test_every_command_is_run_or_says_why_not),
        ("<!-- run -->\n\n```\nkintsugi up\n```", test_every_command_is_run_or_says_why_not),
        ("```python\nprint()\n```", test_every_command_is_run_or_says_why_not),
        ("```text\nkintsugi up\n```", test_what_is_shown_only_is_no_command),
        ("```console\n$ kintsugi up\n```", test_what_is_shown_only_is_no_command),
        ('<!-- "kintsugi down" run -->\n<!-- run -->\n```\nkintsugi up\n```', test_a_mark_is_of_something),
        ("<!-- not run: it is tedious -->\n```\nkintsugi up\n```", test_what_is_not_run_has_one_of_few_reasons),
    ],
)
def test_a_page_that_breaks_a_rule_is_found(
    page: str, check: Callable[[Any], None], tmp_path: Path, read_page: Callable[[Path], Any]
) -> None:
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(AssertionError):
        check(list(read_page(tmp_path / "page.md")))


@pytest.mark.parametrize(
    ("command", "named"),
    [("kintsugi jobs stop 1", True), ("kintsugi detector train x y", False), ("make image-check", False)],
)
def test_a_test_names_what_it_runs(command: str, named: bool, blocks: Any) -> None:
    elsewhere = next(block for block in blocks if block.page == "quickstart.md")
    assert names(ROOT / "tests/e2e/test_submit.py", elsewhere, command) is named


def test_a_call_of_pytest_that_selects_nothing_is_found(known_tests: dict[Path, list[str]]) -> None:
    assert selected(["tests/test_docs.py", "-k", "selects_nothing"], known_tests)
    assert not selected(["tests/test_docs.py", "-k", "selects and no_such"], known_tests)
    assert not selected(["tests/no_such.py"], known_tests)
