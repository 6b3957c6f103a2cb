"""The whole examination, and the command."""

import json
from pathlib import Path

import pytest

from kintsugi import cli, doctor
from kintsugi.doctor import Finding, here
from kintsugi.doctor.finding import ok, problem
from kintsugi.errors import StackError


@pytest.fixture(autouse=True)
def _no_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "USUAL_DASHBOARD", "http://127.0.0.1:1")


def run(*words: str) -> int:
    try:
        return cli.main(["doctor", *words])
    except SystemExit as stop:
        return int(stop.code or 0)


def broken() -> Finding:
    raise RuntimeError("unforeseen")


def refused() -> Finding:
    raise StackError("it is so: do this")


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on() -> None:
    checks = {"a": broken, "b": refused, "c": lambda: ok("c", "fine"), "d": lambda: None}
    found = doctor.examine(checks)
    assert [(finding.about, finding.state) for finding in found] == [("a", "warning"), ("b", "problem"), ("c", "ok")]
    assert "RuntimeError: unforeseen" in found[0].tells
    assert (found[1].tells, found[1].mend) == ("it is so", "do this")


def test_every_warning_and_problem_on_this_machine_says_how_to_mend_it() -> None:
    for finding in doctor.examine():
        assert bool(finding.mend) == (finding.state in ("warning", "problem")), finding


def test_the_command_ends_with_0_and_names_no_problem_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kintsugi.commands.doctor.examine", lambda: [ok("disk", "fine")])
    assert run() == 0
    assert "nothing is open, missing or old" in capsys.readouterr().out


def test_the_command_ends_with_1_and_tells_the_remedy(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "ray-token").write_text("hunter2")
    (home / "ray-token").chmod(0o644)
    monkeypatch.setenv("COLUMNS", "80")
    assert run() == 1
    out = capsys.readouterr().out
    assert "mend: run 'chmod 600" in out
    assert "1 problem" in out.splitlines()[-1] and "hunter2" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_for_machines_it_is_one_document(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "stack.json").write_text("{")
    (home / "stack.json").chmod(0o600)
    assert run("--json") == 1
    told = json.loads(capsys.readouterr().out)
    states = {finding["about"]: finding["state"] for finding in told["findings"]}
    assert states["stack"] == "problem" and told["problems"] == list(states.values()).count("problem")
    assert "record" not in states


def test_markup_in_what_is_told_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [problem("store", "no [bold] here", "mend [this]")]
    monkeypatch.setattr("kintsugi.commands.doctor.examine", lambda: found)
    assert run() == 1
    assert "no [bold] here" in (out := capsys.readouterr().out) and "mend: mend [this]" in out
