"""Training's transfers through a real S3 server that fails as S3 does when it is busy or far away.

A proxy on the loopback interface plays the faults of a seeded plan, and counts them.
"""

import json
import pickle
import random
import socket
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

from kintsugi import local, processes
from kintsugi.checkpoint import fetch_best, fetch_newest
from kintsugi.config import ExperimentConfig
from kintsugi.data.dataset import open_split
from kintsugi.errors import StoreUnavailable
from kintsugi.manifest import make_manifest, put_folder
from kintsugi.stack import credentials_file, write_credentials
from kintsugi.storage import LONG, LocalStore, Patience, S3Store
from kintsugi.training.curves import Curves
from kintsugi.training.filesystem import run_storage
from kintsugi.training.state import build_state

BLOCK = ("busy",) * 6 + ("reset", "deaf", "torn", "stall") + ("clean",) * 10
"""Of 20 requests: 503, connection reset, done but the answer lost, answer cut off, answer that never comes."""
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
PLANNED = 60
HASTY = Patience(seconds=120, stall_s=1.0)


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to an S3 server but for those whose turn in the plan is a fault."""

    daemon_threads = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.counts, self.closing = target, Counter[str](), threading.Event()
        self._plan, self._lock = iter(()), threading.Lock()

    def fail(self, block: Sequence[str], seed: int, blocks: int = 1000) -> None:
        """From now on play `block` in another order again and again, `blocks` times, then nothing."""
        chance = random.Random(seed)
        with self._lock:
            self.counts.clear()
            self._plan = iter([fault for _ in range(blocks) for fault in chance.sample(block, len(block))])

    def turn(self) -> str:
        with self._lock:
            fault = next(self._plan, "clean")
            self.counts[fault] += 1
            return fault

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        """No polite end before the close: with SO_LINGER 0 the client shall see a reset."""
        self.close_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _answer(self) -> None:
        body = self._body()
        fault = self.server.turn()
        if fault == "reset":
            self._reset()
        elif fault == "busy":
            self._send(b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n" % len(SLOW_DOWN), SLOW_DOWN)
        else:
            self._forward(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def _body(self) -> bytes:
        """As it came, also where it came in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        read, size = b"", 1
        while size:
            line = self.rfile.readline()
            size = int(line, 16)
            read += line + self.rfile.read(size + 2)
        return read

    def _forward(self, body: bytes, fault: str) -> None:
        upstream = HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        kept = [f"{k}: {v}" for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "content-length")]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        head = "\r\n".join([f"HTTP/1.1 {answer.status} {answer.reason}", *kept, f"Content-Length: {length}", "", ""])
        if fault == "deaf":
            self._reset()
        elif fault == "torn":
            self._send((head.encode() + content)[: (len(head) + len(content)) // 2])
            self._reset()
        elif fault == "stall":
            self._send((head.encode() + content)[: (len(head) + len(content)) // 2])
            self.server.closing.wait()
            self.close_connection = True
        else:
            self._send(head.encode(), content)

    def _send(self, head: bytes, content: bytes = b"") -> None:
        self.wfile.write(head + (b"" if self.command == "HEAD" else content))

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port of a real S3 server, and where its credentials lie."""
    home = tmp_path_factory.mktemp("home")
    write_credentials(home)
    port, *inner = processes.free_ports(8)
    # Paths of sockets must stay below 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kintsugi-", dir="/tmp") as scratch:
        command = local._s3_command(home, Path(scratch), port, inner)
        record = processes.start(command, env=local._s3_environment(Path(scratch)), folder=home, log=home / "s3.log")
        try:
            came = processes.wait_until(lambda: local._answers(f"http://127.0.0.1:{port}/"), 60)
            assert came, (home / "s3.log").read_text()
            yield port, home
        finally:
            processes.stop(record, 3)


@pytest.fixture
def proxy(s3: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """In front of the S3 server; the environment names it as the endpoint."""
    port, home = s3
    keys = json.loads(credentials_file(home).read_bytes())["identities"][0]["credentials"][0]
    server = FaultyProxy(port)
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1",
        "AWS_ACCESS_KEY_ID": keys["accessKey"], "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # boto3 keeps the first credentials that it finds for the life of a process.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    S3Store("s3://kintsugi").create_bucket()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


def train_once(store: S3Store, config: ExperimentConfig, folder: Path, number: int) -> None:
    """What a run sends and fetches in an epoch, and at its start."""
    for split in ("train", "val"):
        assert len(open_split(store, "tiny", split, folder / f"cache-{number}")) == {"train": 9, "val": 2}[split]
    state = build_state(config, "digest")
    state.epoch = number
    state.save(folder / "saved", config, {"score": float(number), "epoch": number}, {})
    prefix = f"runs/r/checkpoint_{number:04d}"
    put_folder(store, prefix, folder / "saved", make_manifest(folder / "saved", "checkpoint"))
    assert fetch_newest(store, "r", folder / "newest") == prefix
    assert fetch_best(store, "r", folder / "best").metrics["epoch"] == number
    with Curves(store, f"runs/r/curves/{number}") as curves:
        curves.log({"score": float(number)}, number)


def test_a_third_of_503s_resets_lost_torn_and_missing_answers_end_no_transfer_of_training(
    proxy: FaultyProxy, tiny_store: LocalStore, tiny_config: ExperimentConfig, tmp_path: Path
) -> None:
    store = S3Store("s3://kintsugi/faulty", HASTY)
    for info in tiny_store.list():
        store.put(info.key, tiny_store.root / info.key)
    proxy.fail(BLOCK, seed=1)
    number = 0
    while proxy.counts.total() < PLANNED:
        number += 1
        train_once(store, tiny_config, tmp_path, number)
    assert len(list(store.list("runs/r/curves/"))) == number
    for fault, share in Counter(BLOCK).items():
        assert proxy.counts[fault] >= PLANNED // len(BLOCK) * share, (fault, proxy.counts)


def test_a_store_that_stays_away_is_told_with_the_time_that_was_tried(proxy: FaultyProxy, tmp_path: Path) -> None:
    store = S3Store("s3://kintsugi/away", Patience(seconds=1, requests=2))
    store.put("k", b"content")
    proxy.fail(("busy", "reset"), seed=2)
    told = r"s3://kintsugi/away .*tried for \d+ s"
    with pytest.raises(StoreUnavailable, match=told):
        store.get("k")
    with pytest.raises(StoreUnavailable, match=told):
        store.download("k", tmp_path / "k")
    assert proxy.counts["busy"] and proxy.counts["reset"]


def test_an_outage_longer_than_the_tries_of_one_request_is_waited_out(proxy: FaultyProxy, tmp_path: Path) -> None:
    store = S3Store("s3://kintsugi/outage", Patience(seconds=120, requests=2, stall_s=1))
    (tmp_path / "sent").write_bytes(bytes(range(256)) * 4096)
    proxy.fail(("reset",) * 7, seed=3, blocks=1)
    store.put("k", tmp_path / "sent")
    proxy.fail(("torn",) * 7, seed=4, blocks=1)
    store.download("k", tmp_path / "back")
    proxy.fail(("torn",) * 3, seed=5, blocks=1)
    assert store.get("k") == (tmp_path / "sent").read_bytes() == (tmp_path / "back").read_bytes()
    assert proxy.counts["torn"] == 3


def test_what_ray_notes_of_a_run_outlives_failures_too(proxy: FaultyProxy) -> None:
    there = pickle.loads(pickle.dumps(run_storage("s3://kintsugi/ray")["storage_filesystem"]))
    proxy.fail(("busy", "reset", "busy", "torn", "busy", "stall"), seed=6, blocks=1)
    with there.open_output_stream("kintsugi/ray/state.json") as stream:
        stream.write(b"{}")
    assert there.open_input_stream("kintsugi/ray/state.json").read() == b"{}"
    assert proxy.counts["busy"] == 3 and proxy.counts["stall"] == 1


def test_a_run_in_a_folder_needs_no_file_system_of_its_own() -> None:
    assert run_storage("/a/folder/runs") == {"storage_path": "/a/folder/runs"}


def test_a_read_that_stalls_ends_well_before_a_minute_and_a_run_waits_longer_than_a_command() -> None:
    assert LONG.stall_s <= Patience().stall_s < 60
    assert LONG.seconds > 60 * Patience().seconds
