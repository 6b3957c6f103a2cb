"""The client, its command and its guide against a real server on a real socket, which also fails as networks do."""

import contextlib
import json
import re
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray

from kintsugi import cli, imaging
from kintsugi_serve.access.keys import Key, sha256_of
from kintsugi_serve.client import Client, RetryBudget, ServiceError
from kintsugi_serve.ingress.api import build_api
from kintsugi_serve.schemas import Refusal, Settings

KEY = "a-key-of-the-line"


@contextlib.contextmanager
def _served(app: Any) -> Iterator[int]:
    """The port at which `app` answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


class Seeing:
    """As another backend, with a map of defects that is an image."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.levels: NDArray[np.uint8] | None = np.array([[0, 51, 255]], np.uint8)

    async def restore(self, job: Any) -> Any:
        shown = job.defect_map and self.levels is not None
        encoded = imaging.encode(imaging.Image(self.levels)) if shown else None
        return replace(await self._backend.restore(job), defect_map=encoded)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


@pytest.fixture
def seeing(echo: Any) -> Seeing:
    return Seeing(echo)


@pytest.fixture
def port(seeing: Seeing, settings: Settings) -> Iterator[int]:
    with _served(build_api(settings, seeing)) as port:
        yield port


@pytest.fixture
def address(port: int) -> str:
    return f"http://127.0.0.1:{port}"


Fault = Callable[[socket.socket, bytes], None]


def _reset(connection: socket.socket, answer: bytes) -> None:
    connection.sendall(answer[: len(answer) // 2])
    # A close that does not linger sends RST.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _cut(connection: socket.socket, answer: bytes) -> None:
    connection.sendall(answer[:-1])


def _hang_up(connection: socket.socket, answer: bytes) -> None:
    pass


def _flip(connection: socket.socket, answer: bytes) -> None:
    connection.sendall(answer[:-1] + bytes([answer[-1] ^ 1]))


def _bad_gateway(connection: socket.socket, answer: bytes) -> None:
    connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\nConnection: close\r\n\r\noops")


def _pass(connection: socket.socket, answer: bytes) -> None:
    connection.sendall(answer)


class Network(socketserver.ThreadingTCPServer):
    """Lies between client and service; each answer meets the next fault, and passes where there is none."""

    daemon_threads = True

    def __init__(self, port: int, faults: list[Fault]) -> None:
        super().__init__(("127.0.0.1", 0), Passage)
        self.upstream = port
        self.faults = faults
        self.requests: list[bytes] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Passage(socketserver.StreamRequestHandler):
    server: Network

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.rfile.readline()
        length = re.search(rb"(?i)content-length: (\d+)", head)
        request = re.sub(rb"(?i)connection: keep-alive", b"Connection: close", head)
        request += self.rfile.read(int(length[1]) if length else 0)
        self.server.requests.append(request)
        with socket.create_connection(("127.0.0.1", self.server.upstream)) as upstream:
            upstream.sendall(request)
            answer = b"".join(iter(lambda: upstream.recv(65536), b""))
        fault = self.server.faults.pop(0) if self.server.faults else _pass
        fault(self.connection, answer)


@pytest.fixture
def network(port: int) -> Iterator[Callable[..., Network]]:
    with contextlib.ExitStack() as opened:

        def build(*faults: Fault) -> Network:
            found = opened.enter_context(Network(port, list(faults)))
            thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            opened.callback(thread.join)
            opened.callback(found.shutdown)
            return found

        yield build


@pytest.mark.parametrize("fault", [_reset, _cut, _hang_up, _flip, _bad_gateway])
def test_no_fault_of_a_network_loses_or_damages_an_image(
    fault: Fault, network: Callable[..., Network], picture: Callable[[], bytes], echo: Any
) -> None:
    between, image = network(fault, fault), picture()
    with Client(between.address, max_wait_s=0.01) as client:
        assert client.restore(image).data == image
    assert [job.image for job in echo.jobs] == [image] * 3
    keys = {key for request in between.requests for key in re.findall(rb"(?i)idempotency-key: (\S+)", request)}
    assert len(keys) == 1 and len(between.requests) == 3


@pytest.mark.parametrize(("fault", "code"), [(_reset, "unreachable"), (_cut, "unreachable"), (_flip, "corrupted")])
def test_a_fault_that_stays_is_told(
    fault: Fault, code: str, network: Callable[..., Network], picture: Callable[[], bytes]
) -> None:
    with Client(network(fault, fault).address, retries=1, max_wait_s=0.01) as client:
        with pytest.raises(ServiceError) as caught:
            client.restore(picture())
        assert caught.value.code == code


def test_many_images_through_a_bad_network_all_arrive(network: Callable[..., Network], echo: Any) -> None:
    between = network(*[_reset, _pass, _cut, _pass, _flip, _pass, _hang_up, _pass] * 5)
    sources = [str(index).encode() * 1000 for index in range(60)]
    # By chance one image may meet all 20 faults.
    with Client(between.address, max_wait_s=0.05, retries=20, budget=RetryBudget(reserve=20)) as client:
        outcomes = list(client.restore_many(sources, concurrency=4))
    assert [outcome.error for outcome in outcomes if outcome.error] == []
    assert {outcome.index: outcome.image.data for outcome in outcomes if outcome.image} == dict(enumerate(sources))
    assert len(between.requests) == 60 + 20


def _run(*words: str) -> int:
    try:
        return cli.main(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def folder(tmp_path: Path, picture: Callable[[], bytes]) -> Path:
    """A folder `parts` with three images, one of them below a folder of its own, and a file that is none."""
    for name in ("a.png", "b.png", "night/c.png", "notes.txt"):
        path = tmp_path / "parts" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(picture())
    return tmp_path


def test_the_command_lets_a_service_restore(
    address: str, folder: Path, echo: Any, picture: Callable[[], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = str(folder / "parts/a.png"), folder / "out.png"
    words = ("restore", source, str(target), "--endpoint", address)
    assert _run(*words, "--mask", source, "--white-level", "255") == 0
    assert capsys.readouterr().out == f"{target}: unet@3, structure kept 0.99\n"
    assert target.read_bytes() == picture() == echo.jobs[0].mask and echo.jobs[0].white_level == 255
    assert _run(*words) == 1
    assert "add --force" in capsys.readouterr().err and len(echo.jobs) == 1
    assert _run(*words, "--force", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["digest"], told["retention"]) == ("unet@3", "d" * 64, 0.9876) and told["request_id"]


def test_a_folder_is_restored_image_by_image(
    address: str, folder: Path, picture: Callable[[], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("restore", str(folder / "parts"), str(folder / "out"), "--endpoint", address)
    assert _run(*words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["restored"], told["failed"]) == (3, 0)
    assert [Path(each["output"]).relative_to(folder).as_posix() for each in told["images"]] == [
        "out/a.png",
        "out/b.png",
        "out/night/c.png",
    ]
    assert all(Path(each["output"]).read_bytes() == picture() for each in told["images"])
    assert _run(*words, "--force") == 0
    assert capsys.readouterr().out.count("structure kept 0.99") == 3


def test_images_of_a_folder_that_fail_are_told_and_the_others_are_there(
    address: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "parts/b.png").write_bytes(b"")
    words = ("restore", str(folder / "parts"), str(folder / "out"), "--endpoint", address)
    assert _run(*words) == 1
    told = capsys.readouterr()
    assert "1 of 3 images were not restored" in told.err and "b.png: the body is empty" in told.err
    assert sorted(path.name for path in (folder / "out").rglob("*.png")) == ["a.png", "c.png"]
    assert _run(*words, "--force", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["restored"], document["failed"]) == (2, 1) and "the body is empty" in document["images"][1][
        "error"
    ]


def test_a_refusal_is_one_sentence_with_the_requests_id(
    address: str, folder: Path, echo: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    echo.failure = Refusal("mask_required", "give the mask too")
    assert _run("restore", str(folder / "parts/a.png"), str(folder / "out.png"), "--endpoint", address) == 1
    assert re.fullmatch(r"error: give the mask too \(request id [0-9a-f-]{36}\)\n", capsys.readouterr().err)
    assert not (folder / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--tile", "256", "--ensemble", "flips"), "--ensemble, --tile cannot be asked of a service"),
        (("--error-map", "e.png"), "--error-map cannot be asked of a service"),
        (("--defect-map", "d.jpg"), "a map is a PNG or a TIFF"),
        (("--api-key-env", "NO_SUCH_KEY"), "no environment variable NO_SUCH_KEY"),
    ],
)
def test_what_a_service_cannot_do_is_refused_by_name(
    options: tuple[str, ...],
    sentence: str,
    address: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert _run("restore", "parts/a.png", "out.png", "--endpoint", address, *options) == 1
    assert sentence in capsys.readouterr().err
    assert not (folder / "out.png").exists()


def test_an_endpoint_that_is_none_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("restore", str(folder / "parts/a.png"), str(folder / "out.png"), "--endpoint")
    assert _run(*words, "127.0.0.1:8000") == 1
    assert "write it as http://host:8000" in capsys.readouterr().err


def test_the_key_comes_from_the_environment(
    echo: Any, settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded = settings.model_copy(update={"keys": (Key(tenant="line", sha256=sha256_of(KEY)),)})
    monkeypatch.delenv("KINTSUGI_API_KEY", raising=False)
    with _served(build_api(guarded, echo)) as port:
        words = ("restore", str(folder / "parts/a.png"), str(folder / "out.png"), "--force")
        words = (*words, "--endpoint", f"http://127.0.0.1:{port}")
        assert _run(*words) == 1
        assert "send a known key" in capsys.readouterr().err
        monkeypatch.setenv("KINTSUGI_API_KEY", KEY)
        assert _run(*words) == 0
        monkeypatch.setenv("KINTSUGI_API_KEY", "another")
        monkeypatch.setenv("KEY_OF_LINE_2", KEY + "\n")
        assert _run(*words, "--api-key-env", "KEY_OF_LINE_2") == 0


def test_the_snippets_of_the_guide_run(
    repository: Path, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("KINTSUGI_API_KEY", raising=False)
    (folder / "part.png").write_bytes((folder / "parts/a.png").read_bytes())
    (folder / "restored").mkdir()
    text = (repository / "docs/client.md").read_text().replace("http://127.0.0.1:8000", address)
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 5
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert imaging.decode((folder / "restored.png").read_bytes()).size == (40, 48)
    assert {path.name for path in (folder / "restored").iterdir()} == {"a.png", "b.png"}
    assert capsys.readouterr().out.splitlines()[0] == "0.9876 False"
    commands = re.findall(r"^kintsugi (restore .*)$", text, re.MULTILINE)
    assert [_run(*command.split(), "--force") for command in commands] == [0, 0]


def test_a_map_of_the_service_is_written_beside_the_image(
    address: str, folder: Path, seeing: Seeing, picture: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = ("restore", "parts/a.png", "out.png", "--endpoint", address)
    assert _run(*words, "--defect-map", "map.tiff") == 0
    written = imaging.decode((folder / "map.tiff").read_bytes())
    assert written.format == "tiff" and np.array_equal(written.pixels, seeing.levels)
    assert (folder / "out.png").read_bytes() == picture()


def test_a_model_that_sees_no_defects_is_told_where_a_map_is_wanted(
    address: str, folder: Path, seeing: Seeing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    seeing.levels = None
    assert _run("restore", "parts/a.png", "out.png", "--endpoint", address, "--defect-map", "map.png") == 1
    assert "predicts no defect map" in capsys.readouterr().err
    assert not (folder / "out.png").exists() and not (folder / "map.png").exists()


def test_bytes_that_were_damaged_on_their_way_to_the_service_are_sent_again(address: str, echo: Any) -> None:
    class Damaging(httpx2.HTTPTransport):
        """Turns one bit of the first body that passes."""

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            if not sent:
                body = bytearray(request.read())
                body[0] ^= 1
                request = httpx2.Request(request.method, request.url, headers=request.headers, content=bytes(body))
            sent.append(request)
            return super().handle_request(request)

    sent: list[httpx2.Request] = []
    with Client(address, transport=Damaging(), max_wait_s=0.01) as client:
        assert client.restore(b"image").data == b"image"
    assert len(sent) == 2 and [job.image for job in echo.jobs] == [b"image"]
