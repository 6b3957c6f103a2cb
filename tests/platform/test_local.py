"""The local stack, started for real."""

import json
import os
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kintsugi import local, processes
from kintsugi.errors import StackError
from kintsugi.local import Ports, Stack
from kintsugi.processes import ProcessRecord
from kintsugi.stack import credentials_file, save, token_file, write_credentials

FREE = Ports(s3=0, dashboard=0, tensorboard=0, gcs=0, endpoint=0)

USE_STORE = """
from kintsugi.errors import PreconditionFailed
from kintsugi.storage import S3Store
store = S3Store("s3://kintsugi")
store.put("a/b", b"first", if_none_match=True)
try:
    store.put("a/b", b"second", if_none_match=True)
except PreconditionFailed:
    print(store.get("a/b").decode())
"""

USE_RAY = """
import ray
ray.init(logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=0.5)
def seen():
    import os, platform
    from kintsugi.storage import S3Store
    return platform.system(), os.environ["KINTSUGI_STORE"], S3Store("s3://kintsugi").get("a/b").decode()

print(*ray.get(seen.remote()))
"""

WRITE_CURVE = """
import pathlib, sys
from torch.utils.tensorboard import SummaryWriter
from kintsugi.storage import S3Store
writer = SummaryWriter(sys.argv[1])
writer.add_scalar("loss", 0.5, 1)
writer.close()
[events] = pathlib.Path(sys.argv[1]).iterdir()
S3Store("s3://kintsugi").put("runs/one/" + events.name, events)
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    local.down(tmp_path / "home")


def run(code: str, variables: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def get(url: str, token: str = "") -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def record_stack(home: Path, **records: ProcessRecord) -> Stack:
    home.mkdir()
    scratch = home / "scratch"
    scratch.mkdir()
    at = "http://127.0.0.1:1"
    stack = Stack(
        s3_endpoint=at,
        store_uri="s3://kintsugi",
        ray_address="127.0.0.1:1",
        dashboard=at,
        tensorboard=at,
        endpoint=at,
        scratch=scratch,
        processes=records,
    )
    save(home, stack)
    return stack


def sleeper(folder: Path) -> ProcessRecord:
    command = [sys.executable, "-c", "import time; time.sleep(300)"]
    return processes.start(command, env=os.environ, folder=folder, log=folder / "sleeper.log")


@pytest.mark.timeout(180)
def test_a_stack_comes_up_serves_and_leaves_nothing_behind(home: Path, tmp_path: Path) -> None:
    told: list[str] = []
    stack = local.up(home, FREE, cpus=1, progress=told.append)
    variables = local.environment(stack, home)
    family = [process for record in stack.processes.values() for process in processes.family(record)]
    ports = _listens_on_loopback_only(family)
    assert stack.s3_endpoint and len(told) == 3

    assert stat.S_IMODE(credentials_file(home).stat().st_mode) == 0o600
    assert run(USE_STORE, variables).stdout.strip() == "first"
    refused = run(USE_STORE, variables | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert refused.returncode == 1 and "refused the credentials" in refused.stderr

    assert run(USE_RAY, variables).stdout.split() == [os.uname().sysname, "s3://kintsugi", "first"]
    assert get(stack.dashboard)[0] == 200
    assert get(f"{stack.dashboard}/api/jobs/")[0] == 401
    assert get(f"{stack.dashboard}/api/jobs/", token_file(home).read_text())[0] == 200

    assert run(WRITE_CURVE, variables, str(tmp_path / "curve")).returncode == 0
    assert processes.wait_until(lambda: json.loads(get(f"{stack.tensorboard}/data/runs")[1]) == ["one"], 60)

    with pytest.raises(StackError, match=r"already running.*'kintsugi down' stops it"):
        local.up(home, FREE)
    assert {state for _, state, _ in local.status(home)[:4]} == {"running"}

    family += [process for record in stack.processes.values() for process in processes.family(record)]
    assert local.down(home) == ["tensorboard", "ray", "s3"]
    assert not [process for process in family if processes.runs(process)]
    assert not [port for port in ports if not processes.is_free(port)]
    assert local.find(home) is None and not stack.scratch.exists()
    assert list((home / "s3").iterdir())


def _listens_on_loopback_only(family: list[psutil.Process]) -> list[int]:
    """The ports on which these processes listen, none of them beyond this machine."""
    found = [c.laddr for p in family for c in p.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in found} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    return [address.port for address in found]


@pytest.mark.timeout(120)
def test_a_part_that_dies_while_starting_takes_the_others_with_it_and_is_named(home: Path) -> None:
    home.mkdir()
    write_credentials(home)
    spoiled = json.loads(credentials_file(home).read_text())
    spoiled["identities"][0]["actions"] = 5
    credentials_file(home).write_text(json.dumps(spoiled))
    with pytest.raises(
        StackError, match=r"s3 stopped while it was starting: see .*s3\.log, which tells: .*fail to load"
    ):
        local.up(home, FREE, cpus=1)
    assert local.find(home) is None
    assert not [p for p in psutil.process_iter() if _in_folder(p, home)]


def _in_folder(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd() == str(folder)
    except psutil.Error:
        return False


def test_a_taken_port_is_named_with_its_holder_and_the_way_out(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sentence = rf"port {port} is taken by process {os.getpid()} \(.*\): stop it or use --s3-port"
        with pytest.raises(StackError, match=sentence):
            local.up(home, Ports(s3=port, dashboard=0, tensorboard=0, gcs=0, endpoint=0))
    assert local.find(home) is None


def test_two_parts_cannot_be_given_one_port(home: Path) -> None:
    with pytest.raises(StackError, match="cannot share a port"):
        local.up(home, Ports(s3=0, dashboard=21999, tensorboard=21999, gcs=0, endpoint=0))


def test_a_stack_with_a_dead_part_is_shown_refused_and_cleaned(home: Path, tmp_path: Path) -> None:
    alive, dead = sleeper(tmp_path), sleeper(tmp_path)
    processes.stop(dead, 10)
    stack = record_stack(home, s3=alive, ray=dead)
    states = {name: state for name, state, _ in local.status(home)}
    assert (states["s3"], states["ray"], states["tensorboard"]) == ("running", "stopped", "stopped")
    with pytest.raises(StackError, match=r"not all of it runs \(s3 running, ray stopped.*run 'kintsugi down' first"):
        local.up(home, FREE)
    assert local.down(home) == ["s3"]
    assert processes.state(alive) == "stopped"
    assert local.find(home) is None and not stack.scratch.exists()


def test_a_stale_record_does_not_stop_the_process_that_got_the_id(home: Path, tmp_path: Path) -> None:
    stranger = sleeper(tmp_path)
    record_stack(home, s3=ProcessRecord(pid=stranger.pid, create_time=stranger.create_time - 3600))
    assert ("s3", "pid reused", "http://127.0.0.1:1") in local.status(home)
    with pytest.raises(StackError, match="s3 pid reused"):
        local.up(home, FREE)
    assert local.down(home) == []
    assert processes.state(stranger) == "running"
    processes.stop(stranger, 10)


def test_down_and_status_of_nothing_do_nothing(home: Path) -> None:
    assert local.down(home) == []
    assert local.status(home) == []
    assert not home.exists()


def test_a_home_that_is_a_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match="set KINTSUGI_HOME"):
        local.up(tmp_path / "file", FREE)


def test_a_second_up_at_the_same_time_is_refused(home: Path) -> None:
    import fcntl

    home.mkdir()
    with (home / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StackError, match="another 'kintsugi up' or 'down' is at work"):
            local.up(home, FREE)
