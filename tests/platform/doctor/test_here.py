import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from kintsugi import processes, stack
from kintsugi.doctor import here
from kintsugi.errors import StackError
from kintsugi.processes import ProcessRecord
from kintsugi.stack import Stack

Serve = Callable[[Mapping[str, tuple[int, bytes]]], str]
Listener = Callable[[str], tuple[ProcessRecord, int]]

LISTENS = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
while True:
    connection, _ = listener.accept()
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
    connection.close()
"""


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Starts a process that listens at an address and answers everything with 200; gives its record and port."""
    started: list[subprocess.Popen[str]] = []

    def start(host: str) -> tuple[ProcessRecord, int]:
        command = [sys.executable, "-c", LISTENS, host]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        port = int(process.stdout.readline())
        return ProcessRecord(pid=process.pid, create_time=psutil.Process(process.pid).create_time()), port

    yield start
    for process in started:
        process.kill()
        process.communicate()


def record(home: Path, *, dashboard: str = "http://127.0.0.1:1", endpoint: int = 1, **parts: ProcessRecord) -> None:
    recorded = Stack(
        s3_endpoint=None,
        store_uri="/a/store",
        ray_address="127.0.0.1:1",
        dashboard=dashboard,
        tensorboard="http://127.0.0.1:1",
        endpoint=f"http://127.0.0.1:{endpoint}",
        scratch=home / "scratch",
        processes=parts,
    )
    stack.save(home, recorded)


def test_a_closed_home_is_well_and_one_not_yet_made_is_a_note(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.write_token(home)
    stack.write_credentials(home)
    assert here.home().state == "ok"
    monkeypatch.setenv("KINTSUGI_HOME", str(home / "later"))
    assert here.home().state == "note"
    assert not (home / "later").exists()


@pytest.mark.parametrize("name", ["credentials.json", "ray-token", "stack.json"])
def test_a_secret_that_others_can_read_is_a_problem_and_the_folder_a_warning(home: Path, name: str) -> None:
    home.chmod(0o755)
    assert here.home().state == "warning" and f"chmod 700 {home}" in here.home().mend
    (home / name).write_text("secret")
    (home / name).chmod(0o640)
    found = here.home()
    assert (found.state, found.mend) == ("problem", f"run 'chmod 600 {home / name}'")


def test_a_home_that_cannot_be_used_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path / "file"))
    assert here.home().state == "problem"


def test_no_stack_is_a_note_and_a_half_dead_one_a_problem(home: Path, listener: Listener) -> None:
    assert here.stack().state == "note" and here.listening() is None and here.endpoint() is None
    alive, _ = listener("127.0.0.1")
    record(home, ray=alive)
    found = here.stack()
    assert found.state == "problem" and found.tells == "recorded, but stopped: tensorboard"
    assert "kintsugi down" in found.mend
    record(home, ray=alive, tensorboard=alive)
    assert here.stack().state == "ok"


def test_a_record_that_cannot_be_read_is_told_once(home: Path) -> None:
    stack.record_file(home).write_text("{")
    with pytest.raises(StackError, match="delete it"):
        here.stack()
    assert here.listening() is None and here.endpoint() is None


def test_a_part_that_no_record_knows_is_named_with_its_process(home: Path, tmp_path: Path) -> None:
    program = tmp_path / "weed"
    program.symlink_to("/bin/sleep")
    left = processes.start([str(program), "300"], env=os.environ, folder=home, log=tmp_path / "log")
    try:
        assert processes.wait_until(lambda: bool(here.leftovers(home, None)), 30)
        found = here.stack()
        assert found.state == "problem" and f"weed {left.pid}" in found.tells and found.mend == f"run 'kill {left.pid}'"
        record(home, s3=left)
        assert here.leftovers(home, stack.find(home)) == []
    finally:
        processes.stop(left, 10)


def test_a_port_beyond_loopback_is_named(home: Path, listener: Listener) -> None:
    inner, _ = listener("127.0.0.1")
    record(home, ray=inner)
    found = here.listening()
    assert found is not None and (found.state, found.tells) == ("ok", "1 ports, all on 127.0.0.1")
    outer, port = listener("0.0.0.0")
    record(home, ray=inner, tensorboard=outer)
    found = here.listening()
    assert found is not None and (found.state, found.tells) == ("problem", f"beyond this machine: 0.0.0.0:{port}")


def test_an_endpoint_beyond_loopback_must_ask_for_keys(home: Path, listener: Listener) -> None:
    inner, port = listener("127.0.0.1")
    record(home, ray=inner, endpoint=port)
    found = here.endpoint()
    assert found is not None and found.state == "ok"
    outer, port = listener("0.0.0.0")
    record(home, ray=outer, endpoint=port)
    found, listening = here.endpoint(), here.listening()
    assert found is not None and found.state == "problem" and "--keys" in found.mend
    assert listening is not None and listening.state == "ok"


@pytest.mark.parametrize(("status", "state"), [(401, "ok"), (200, "problem")])
def test_a_dashboard_is_well_only_if_it_refuses_who_has_no_token(
    home: Path, listener: Listener, serve_http: Serve, status: int, state: str
) -> None:
    record(home, dashboard=serve_http({"/api/version": (status, b"{}")}), ray=listener("127.0.0.1")[0])
    found = here.dashboard()
    assert found is not None and found.state == state


def test_a_stacks_dashboard_that_is_silent_is_a_problem(home: Path, listener: Listener) -> None:
    record(home, ray=listener("127.0.0.1")[0])
    found = here.dashboard()
    assert found is not None and found.state == "problem" and "does not answer" in found.tells


def test_a_strangers_open_dashboard_on_the_usual_port_is_a_problem(
    serve_http: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "USUAL_DASHBOARD", serve_http({"/api/version": (200, b"{}")}))
    found = here.dashboard()
    assert found is not None and found.state == "problem" and "RAY_AUTH_MODE=token" in found.mend
    monkeypatch.setattr(here, "USUAL_DASHBOARD", serve_http({}))
    assert here.dashboard() is None
