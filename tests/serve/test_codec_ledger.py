import os
import time
from pathlib import Path

from kintsugi_serve.codec_ledger import Ledger


def test_the_ledger_keeps_the_latest_entries_only_and_leaves_other_files_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, limit=4)
    (tmp_path / "notes").write_text("somebody's")
    digests = [f"{number:064x}" for number in range(3)]
    for number, digest in enumerate(digests):
        for strike in (1, 2):
            ledger.record(digest, "SIGSEGV")
            os.utime(tmp_path / f"{digest}.{strike}", (number - 10 + time.time(),) * 2)
    assert [ledger.refuses(digest) for digest in digests] == [False, True, True]
    assert len(list(tmp_path.iterdir())) == 5


def test_the_ledger_forgets_what_is_old(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, keep_s=100)
    for _ in range(2):
        ledger.record("a" * 64, "timeout")
    assert ledger.refuses("a" * 64)
    for entry in tmp_path.iterdir():
        os.utime(entry, (time.time() - 101,) * 2)
    assert not ledger.refuses("a" * 64)
    ledger.record("a" * 64, "timeout")
    assert not ledger.refuses("a" * 64)
    ledger.record("a" * 64, "timeout")
    assert ledger.refuses("a" * 64)


def test_decoders_that_share_a_ledger_count_together(tmp_path: Path) -> None:
    one, another = Ledger(tmp_path / "ledger"), Ledger(tmp_path / "ledger")
    assert one.empty()
    one.record("a" * 64, "SIGSEGV")
    assert not another.empty()
    assert not another.refuses("a" * 64)
    another.record("a" * 64, "SIGSEGV")
    one.record("a" * 64, "SIGSEGV")
    assert one.refuses("a" * 64)
    assert another.refuses("a" * 64)
    assert not one.refuses("b" * 64)
