"""Start a program in the background, know it again by process id and start time, and stop it with all its children."""

import contextlib
import itertools
import os
import random
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict

from kintsugi.errors import StackError

State = Literal["running", "stopped", "pid reused"]

SAME_START_S = 2.0
"""A clock step moves the start time that the system reports for one and the same process by a little."""

PORTS_TO_CHOOSE = range(20000, 30000)
"""Below the ephemeral range (32768 on Linux, 49152 elsewhere), so that no outgoing connection takes a chosen port."""

TELLS_OF_AN_ERROR = re.compile(r"^F\d{4} |error|fatal|panic|exception|cannot|failed|fail to", re.IGNORECASE)


class ProcessRecord(BaseModel):
    """A process that was started: its id, and its start in seconds since the epoch, as the id alone gets reused."""

    model_config = ConfigDict(frozen=True)

    pid: int
    create_time: float


def start(command: Sequence[str], *, env: Mapping[str, str], folder: Path, log: Path) -> ProcessRecord:
    """Run `command` in its own session, with stdout and stderr appended to `log`.

    Raises:
        StackError: the program is not there.
    """
    try:
        with log.open("ab") as stream:
            process = subprocess.Popen(
                command,
                env=dict(env),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
    except OSError as error:
        raise StackError(f"{command[0]} cannot be started ({error}): install kintsugi with its dependencies") from error
    process.returncode = 0  # from here on it is known by its id; Popen would warn that it still runs
    return ProcessRecord(pid=process.pid, create_time=_start_time(process.pid))


def state(record: ProcessRecord) -> State:
    """Whether the recorded process runs; a zombie is stopped."""
    try:
        process = psutil.Process(record.pid)
        if abs(process.create_time() - record.create_time) > SAME_START_S:
            return "pid reused"
        return "running" if runs(process) else "stopped"
    except psutil.NoSuchProcess:
        return "stopped"


def family(record: ProcessRecord) -> list[psutil.Process]:
    """The process, what is left of its session, and all their descendants, even if the process itself is gone."""
    if state(record) == "pid reused" or record.create_time < psutil.boot_time() - SAME_START_S:
        return []
    found: dict[int, psutil.Process] = {}
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if pid == record.pid or os.getsid(pid) == record.pid:
                member = psutil.Process(pid)
                found |= {process.pid: process for process in [member, *member.children(recursive=True)]}
    return [process for process in found.values() if runs(process)]


def runs(process: psutil.Process) -> bool:
    """Whether a process is there and is more than a zombie that nobody has reaped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def stop(record: ProcessRecord, grace_s: float) -> bool:
    """Ask the process to end, kill what is left of its family after `grace_s`; whether there was anything to stop.

    Raises:
        StackError: something outlived SIGKILL.
    """
    members = family(record)
    leader = [process for process in members if process.pid == record.pid]
    for process in leader or members:
        _signal(process.terminate)
    left = {process.pid: process for process in [*_wait_gone(members, grace_s), *family(record)]}
    for process in left.values():
        _signal(process.kill)
    stubborn = _wait_gone(left.values(), 10)
    if stubborn:
        raise StackError(f"process {stubborn[0].pid} does not end: stop it yourself, then run 'kintsugi down' again")
    return bool(members)


def free_ports(count: int, avoid: Iterable[int] = ()) -> list[int]:
    """Different ports of 127.0.0.1 on which nothing listens now."""
    candidates = sorted(set(PORTS_TO_CHOOSE) - set(avoid))
    random.SystemRandom().shuffle(candidates)
    return list(itertools.islice(filter(is_free, candidates), count))


def is_free(port: int) -> bool:
    """Whether 127.0.0.1:port can be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def accepts(port: int) -> bool:
    """Whether something on 127.0.0.1:port takes a connection."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def holder(port: int) -> str:
    """Who listens on a port, for people: 'process 123 (weed)', or 'another process' where the system does not tell."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and connection.pid and getattr(connection.laddr, "port", None) == port:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log file on one line; of lines that tell of an error where there are any (Go ends with stacks)."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    except FileNotFoundError:
        lines = []
    telling = [line for line in lines if TELLS_OF_AN_ERROR.search(line)]
    return " | ".join((telling or lines)[-count:]) or "(nothing)"


def wait_until(ready: Callable[[], bool], timeout_s: float) -> bool:
    """Poll `ready`; whether it came true before the deadline."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _start_time(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return time.time()


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()


def _wait_gone(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that still run. A zombie whose parent does not reap it counts as gone."""
    deadline, left = time.monotonic() + timeout_s, list(processes)
    while left and time.monotonic() < deadline:
        _, left = psutil.wait_procs(left, timeout=0.2)
        left = [process for process in left if runs(process)]
    return left
