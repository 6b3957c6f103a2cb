import shutil
import subprocess
from pathlib import Path

import pytest

from kintsugi.training import provenance
from kintsugi.training.provenance import SENT_COMMIT, source_commit, versions


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *who, "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout


def test_the_commit_of_a_checkout_is_known_and_a_change_to_it_is_marked(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    git(tmp_path, "tag", "v1", "-a", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert source_commit(tmp_path / "code") == commit
    (tmp_path / "code" / "a.py").write_text("2")
    assert source_commit(tmp_path / "code") == f"{commit}-dirty"


def test_code_that_only_lies_within_a_repository_of_others_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "theirs.txt").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "theirs")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "a.py").write_text("")
    assert source_commit(tmp_path / "venv") is None


def test_a_folder_without_git_has_no_commit(tmp_path: Path) -> None:
    assert source_commit(tmp_path) is None


def test_code_that_was_sent_has_the_commit_that_was_sent_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv(SENT_COMMIT, "0123abcd-dirty")
    assert source_commit() == "0123abcd-dirty"


def test_a_checkout_knows_better_than_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init")
    copy = tmp_path / "code"
    copy.mkdir()
    shutil.copy(provenance.__file__, copy)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(provenance, "__file__", str(copy / "provenance.py"))
    monkeypatch.setenv(SENT_COMMIT, "0123abcd")
    assert source_commit() == git(tmp_path, "rev-parse", "HEAD").strip()


def test_versions_name_what_decides_over_the_figures() -> None:
    assert {"python", "kintsugi", "torch", "ray", "numpy", "opencv-python-headless"} <= versions().keys()
