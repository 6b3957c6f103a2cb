import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from kintsugi_serve.ingress.audit import audit_logger, keep_audit


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = audit_logger.handlers[:], audit_logger.level, audit_logger.propagate
    yield
    for handler in audit_logger.handlers:
        handler.close()
    audit_logger.handlers[:], audit_logger.level, audit_logger.propagate = before


def _lines(folder: Path) -> list[dict[str, int]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_lines_go_to_a_file_of_the_process_whatever_the_root_logger_lets_through(tmp_path: Path) -> None:
    logging.getLogger().setLevel(logging.ERROR)
    keep_audit(str(tmp_path / "audit"))
    audit_logger.info('{"n": 1}')
    assert _lines(tmp_path / "audit") == [{"n": 1}]


def test_what_is_there_is_never_overwritten_and_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    for number in range(2):
        keep_audit(str(tmp_path))
        audit_logger.info('{"n": %d}', number)
    (file,) = tmp_path.glob("*.jsonl")
    file.rename(tmp_path / "old.jsonl")
    audit_logger.info('{"n": 2}')
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert sorted(line["n"] for line in _lines(tmp_path)) == [0, 1, 2]


def test_without_a_folder_they_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    keep_audit(None)
    audit_logger.info('{"n": 1}')
    assert capsys.readouterr().out == '{"n": 1}\n'
