"""Processes that kintsugi starts and stops by id and start time."""

import os
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from kintsugi import processes
from kintsugi.errors import StackError
from kintsugi.processes import ProcessRecord

SLEEPS = "import time; time.sleep(300)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(300)"
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {DEAF!r}]); time.sleep(300)"


def start(folder: Path, code: str, says: str = "") -> ProcessRecord:
    """Run Python code in the background, and wait until its log holds `says`."""
    log = folder / "process.log"
    record = processes.start([sys.executable, "-c", code], env=os.environ, folder=folder, log=log)
    assert processes.wait_until(lambda: says in log.read_text(), 30)
    return record


def test_a_started_process_is_running_until_it_is_stopped(tmp_path: Path) -> None:
    record = start(tmp_path, SLEEPS)
    assert processes.state(record) == "running"
    assert processes.stop(record, 10)
    assert processes.state(record) == "stopped"
    assert not psutil.pid_exists(record.pid)


def test_stopping_what_has_ended_reports_that_nothing_ran(tmp_path: Path) -> None:
    record = start(tmp_path, "pass")
    assert processes.wait_until(lambda: processes.state(record) == "stopped", 30)
    assert not processes.stop(record, 10)


def test_a_process_that_took_over_the_id_is_told_apart_and_left_alone(tmp_path: Path) -> None:
    record = start(tmp_path, SLEEPS)
    stale = ProcessRecord(pid=record.pid, create_time=record.create_time - 60)
    assert processes.state(stale) == "pid reused"
    assert not processes.stop(stale, 10)
    assert processes.state(record) == "running"
    processes.stop(record, 10)


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    record = start(tmp_path, PARENT, says="deaf")
    family = processes.family(record)
    assert len(family) == 2
    assert processes.stop(record, 1)
    assert not any(map(processes.runs, family))


def test_children_are_found_when_their_parent_was_killed(tmp_path: Path) -> None:
    record = start(tmp_path, PARENT, says="deaf")
    family = processes.family(record)
    os.kill(record.pid, signal.SIGKILL)
    assert processes.wait_until(lambda: processes.state(record) == "stopped", 30)
    assert processes.stop(record, 1)
    assert not processes.family(record)
    assert not any(map(processes.runs, family))


def test_a_record_from_before_the_last_boot_has_no_family() -> None:
    session_of_this_test = os.getsid(0)
    assert processes.family(ProcessRecord(pid=session_of_this_test, create_time=1.0)) == []


def test_a_missing_program_is_reported_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="no-such-program cannot be started"):
        processes.start(["no-such-program"], env=os.environ, folder=tmp_path, log=tmp_path / "log")


def test_the_output_of_a_process_is_in_its_log(tmp_path: Path) -> None:
    record = start(tmp_path, "print('one'); print('two'); print('three')", says="three")
    assert processes.last_lines(tmp_path / "process.log", 2) == "two | three"
    processes.stop(record, 10)


def test_lines_that_tell_of_an_error_come_before_the_end_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("starting\nF1122 cannot bind port\ngoroutine 1\nmain.go:12\n")
    assert processes.last_lines(tmp_path / "log") == "F1122 cannot bind port"
    assert processes.last_lines(tmp_path / "absent") == "(nothing)"


def test_free_ports_are_different_and_leave_out_what_is_listened_on_or_named() -> None:
    assert len(set(processes.free_ports(50))) == 50
    everything_but_one = [port for port in processes.PORTS_TO_CHOOSE if port != 20000]
    assert set(processes.free_ports(1, avoid=everything_but_one)) <= {20000}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not processes.is_free(port)
        assert processes.accepts(port)
        assert processes.holder(port).startswith(f"process {os.getpid()} (")
    assert processes.is_free(port)
    assert not processes.accepts(port)
