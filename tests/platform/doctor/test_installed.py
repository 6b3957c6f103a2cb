import sys
from pathlib import Path

import pytest

from kintsugi.doctor import installed


def test_what_these_tests_run_on_fits() -> None:
    assert installed.python().state == "ok"
    assert installed.packages().state == "ok", installed.packages()
    assert installed.weights().state == "ok"
    assert installed.programs().state == "ok"
    assert installed.optional_programs().state == "note"


def test_an_old_and_a_missing_package_are_named_with_what_is_needed() -> None:
    found = installed.version("numpy")
    wanted = [
        "numpy>=99",
        "no-such-package==1",
        "pyyaml>=1",
        "absent>=1; extra == 'export'",
        "winonly; os_name == 'nt'",
    ]
    assert installed.unfit(wanted) == [f"numpy is {found}, needed >=99", "no-such-package is missing"]


def test_what_is_not_as_locked_is_named() -> None:
    numpy, yaml = installed.version("numpy"), installed.version("pyyaml")
    text = (
        f"numpy=={numpy} \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\n    # via kintsugi\n"
        "pyyaml==0.0.1 \\\n    --hash=sha256:00\n"
        "colorama==9 ; sys_platform == 'win32' \\\n    --hash=sha256:00\n"
    )
    assert installed.unlocked(text) == [f"pyyaml is {yaml}, needed ==0.0.1"]


def test_another_python_is_a_problem_with_the_range_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    found = installed.python()
    assert found.state == "problem" and "3.9.1, and kintsugi needs" in found.tells and found.mend


def test_programs_that_do_not_lie_beside_this_python_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ray").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "weed, tensorboard" in installed.programs().tells
