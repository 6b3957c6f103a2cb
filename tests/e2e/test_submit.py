"""Jobs on a real Ray cluster, by the commands that users type, and through a proxy that cuts connections.

The jobs of all tests are begun at once, as most of what they take is waiting.
"""

import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from kintsugi import local
from kintsugi.training.provenance import source_commit

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
CUTS = (700, 1900, 4000)
LINES = [f"line {number} of a log that is long enough to be cut" for number in range(1, 121)]
PRINT = "for i in $(seq 120); do echo line $i of a log that is long enough to be cut; sleep 0.05; done"
"""It takes its time, so that connections are cut while the job runs."""
COMMIT = "from kintsugi.training.provenance import source_commit; print(source_commit())"


class CuttingProxy:
    """Passes TCP connections on to a port, but cuts the first that follow a log once they brought CUTS bytes."""

    def __init__(self, target: int) -> None:
        self.target, self.cuts, self._lock = target, list[int](), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with closing(client), socket.create_connection(("127.0.0.1", self.target)) as server, suppress(OSError):
            asked = client.recv(65536)
            server.sendall(asked)
            pump = threading.Thread(target=_pump, args=(client, server), daemon=True)
            pump.start()
            self._bring(server, client, self._limit(asked))
            # What another thread reads stays open whoever closes it.
            client.shutdown(socket.SHUT_RD)
            pump.join()

    def _limit(self, asked: bytes) -> int | None:
        with self._lock:
            if b"/logs/tail" not in asked.split(b"\r\n")[0] or len(self.cuts) == len(CUTS):
                return None
            self.cuts.append(CUTS[len(self.cuts)])
            return self.cuts[-1]

    def _bring(self, server: socket.socket, client: socket.socket, limit: int | None) -> None:
        brought = 0
        while part := server.recv(65536):
            left = len(part) if limit is None else limit - brought
            client.sendall(part[:left])
            brought += len(part)
            if limit is not None and brought >= limit:
                if len(self.cuts) % 2:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(65536):
            target.sendall(part)


class Machine:
    """Runs commands against one home folder, whose store is a folder too."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_", "KINTSUGI_"))}
        self.environment = {**kept, "KINTSUGI_HOME": str(self.home), "KINTSUGI_STORE": str(folder / "store")}

    def start(self, *command: str, **variables: str) -> "subprocess.Popen[str]":
        words = [sys.executable, "-m", "kintsugi.cli", *command]
        return self.popen(words, {**self.environment, **variables})

    def popen(self, words: list[str], environment: Mapping[str, str]) -> "subprocess.Popen[str]":
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)

    def run(self, *command: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        return ended(self.start(*command), code)


def ended(process: "subprocess.Popen[str]", code: int = 0) -> "subprocess.CompletedProcess[str]":
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"{process.args}\n{out[-3000:]}\n{err[-3000:]}"
    return subprocess.CompletedProcess(process.args, code, out, err)


@pytest.fixture(scope="module")
def interruptible() -> Generator[None]:
    """A shell starts what runs in its background with SIGINT ignored, and processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, interruptible: None) -> Generator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("jobs"))
    (machine.home.parent / "store").mkdir()
    ports = [part for name in ("dashboard", "tensorboard", "ray", "endpoint") for part in (f"--{name}-port", "0")]
    try:
        machine.run("up", *ports, "--cpus", "2")
        yield machine
    finally:
        machine.run("down")


@pytest.fixture(scope="module")
def by_address(machine: Machine) -> dict[str, str]:
    """What names the stack's cluster to a program that knows nothing of the stack."""
    stack = local.find(machine.home)
    assert stack is not None
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(machine.home / "ray-token")}
    return {"RAY_API_SERVER_ADDRESS": stack.dashboard, "KINTSUGI_HOME": str(machine.home.parent / "elsewhere"), **token}


@pytest.fixture(scope="module")
def proxy(by_address: dict[str, str]) -> Generator[CuttingProxy]:
    with closing(CuttingProxy(urlsplit(by_address["RAY_API_SERVER_ADDRESS"]).port or 0)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def begun(
    machine: Machine, by_address: dict[str, str], proxy: CuttingProxy
) -> "Generator[dict[str, subprocess.Popen[str]]]":
    (hand,) = re.findall(r"^ray job submit .*", (ROOT / "docs/jobs.md").read_text(), re.MULTILINE)
    _, *words = shlex.split(hand)
    through = {**by_address, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{proxy.port}"}
    submit = ("submit", "--entrypoint-num-cpus", "0.1")
    processes = {
        "good": machine.start("submit", "--id", "good", "--", "models", "list"),
        "bad": machine.start(*submit, "--id", "bad", "--json", "--env", "GREETING=hello", "--raw", "--",
            "bash", "-c", f"echo $GREETING $KINTSUGI_STORE; python -c '{COMMIT}'; exit 7"),
        "long": machine.start("submit", "--id", "long", "--raw", "--", "sleep", "1000"),
        "cut": machine.start("submit", "--id", "cut", "--raw", "--", "bash", "-c", PRINT, **through),
        "hand": machine.popen(
            [str(Path(sys.executable).parent / "ray"), *words], {**machine.environment, **by_address}
        ),
    }  # fmt: skip
    yield processes
    for process in processes.values():
        process.kill()


def test_a_verb_runs_as_a_job_with_the_code_that_is_here_and_its_log_is_shown(
    begun: "dict[str, subprocess.Popen[str]]",
) -> None:
    done = ended(begun["good"])
    assert "model  alias  validation score" in done.stdout
    assert "job good is done" in done.stderr


def test_a_job_that_fails_gives_its_exit_code_and_has_the_variables_that_were_asked_for_and_the_commit_of_its_code(
    machine: Machine, begun: "dict[str, subprocess.Popen[str]]"
) -> None:
    done = ended(begun["bad"], 7)
    (document,) = done.stdout.splitlines()
    assert json.loads(document)["state"] == "failed" and json.loads(document)["exit_code"] == 7
    assert f"hello {machine.environment['KINTSUGI_STORE']}\n{source_commit()}\n" in done.stderr


def test_no_line_of_a_log_is_lost_or_shown_twice_when_the_connection_is_cut(
    begun: "dict[str, subprocess.Popen[str]]", proxy: CuttingProxy
) -> None:
    done = ended(begun["cut"])
    assert [line for line in done.stdout.splitlines() if line.startswith("line")] == LINES
    assert proxy.cuts == list(CUTS)
    assert "connection lost" in done.stderr and "connected again" in done.stderr


def test_rays_own_command_submits_as_the_page_on_jobs_says(begun: "dict[str, subprocess.Popen[str]]") -> None:
    assert "[]" in ended(begun["hand"]).stdout.splitlines()


def test_a_name_is_begun_once_and_told_again_and_refused_to_another_command(
    machine: Machine, begun: "dict[str, subprocess.Popen[str]]"
) -> None:
    begun["good"].wait(timeout=240)
    again = machine.start("submit", "--id", "good", "--", "models", "list")
    other = ended(machine.start("submit", "--id", "good", "--", "models", "list", "--json"), 1)
    told = ended(again)
    assert "known already (succeeded)" in told.stderr and told.stdout == ""
    assert "'python -m kintsugi.cli models list', not 'python -m kintsugi.cli models list --json'" in other.stderr


def test_a_job_outlives_an_interrupt_is_shown_to_others_listed_and_stopped(
    machine: Machine, begun: "dict[str, subprocess.Popen[str]]"
) -> None:
    first = begun["long"]
    assert first.stdout is not None and "Runtime env is setting up" in first.stdout.readline()
    first.send_signal(signal.SIGINT)
    assert "job long runs on: 'kintsugi jobs logs long' follows it" in ended(first, 130).stderr
    left = machine.start("submit", "--no-wait", "--id", "long", "--raw", "--", "sleep", "1000")
    follower = machine.start("jobs", "logs", "long")
    assert "'kintsugi jobs logs long' follows it" in ended(left).stdout
    assert follower.stdout is not None
    assert "Runtime env is setting up" in follower.stdout.readline()
    assert "is being stopped" in machine.run("jobs", "stop", "long").stdout
    assert "job long was stopped" in ended(follower, 1).stderr
    states = {job["id"]: job["state"] for job in json.loads(machine.run("jobs", "list", "--json").stdout)}
    assert states["long"] == "stopped" and {"good", "bad", "cut", "by-hand"} <= set(states)


def test_a_cluster_that_wants_a_token_says_which(machine: Machine, by_address: dict[str, str]) -> None:
    address = by_address["RAY_API_SERVER_ADDRESS"]
    without = machine.start("jobs", "list", "--address", address, KINTSUGI_HOME=by_address["KINTSUGI_HOME"])
    wrong = machine.home.parent / "wrong"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    with_another = machine.start("jobs", "list", **{**by_address, "RAY_AUTH_TOKEN_PATH": str(wrong)})
    assert "wants a token: set RAY_AUTH_MODE=token" in ended(without, 1).stderr
    assert "refuses the token" in ended(with_another, 1).stderr
