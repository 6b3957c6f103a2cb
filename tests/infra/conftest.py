"""The real nginx in front of small scripted upstreams."""

import datetime
import importlib.util
import ipaddress
import json
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kintsugi_serve.schemas import PROBLEMS

LIMIT_S = 30.0
GATEWAY = Path(__file__).parents[1] / "benchmarks/gateway.py"


@dataclass(frozen=True)
class Received:
    """A request as the upstream saw it; header names in small letters."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What the upstream answers; without a status it hangs up instead."""

    status: int | None = 200
    body: bytes = b"restored"
    kind: str = "image/png"
    more: tuple[tuple[str, str], ...] = ()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class Upstream:
    """An HTTP server on loopback that answers by a function and remembers what it was asked."""

    def __init__(self, answer: Callable[[Received], Reply]) -> None:
        self.received: list[Received] = []
        self._answer = answer
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                self.close_connection = True
                if self.raw_requestline and self.parse_request():
                    upstream.serve(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        body = handler.rfile.read(int(headers.get("content-length", "0")))
        request = Received(handler.command, handler.path, headers, body)
        self.received.append(request)
        reply = self._answer(request)
        if reply.status is None:
            reset(handler.connection)
            return
        handler.send_response(reply.status)
        for name, value in (("Content-Type", reply.kind), ("Content-Length", str(len(reply.body))), *reply.more):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(reply.body)


def reset(connection: socket.socket) -> None:
    """Hang up as a process does that was killed with data unread."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.fixture
def upstream() -> Iterator[Callable[..., Upstream]]:
    """Starts upstreams that answer by a function, or with one reply always."""
    with ExitStack() as stack:

        def start(answer: Callable[[Received], Reply] | Reply | None = None) -> Upstream:
            reply = answer or Reply()
            server = Upstream(reply if callable(reply) else lambda _: reply)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def reply() -> type[Reply]:
    return Reply


@pytest.fixture(scope="session")
def gateways() -> ModuleType:
    """tests/benchmarks/gateway.py."""
    spec = importlib.util.spec_from_file_location("gateway", GATEWAY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Front:
    """A running gateway as its clients meet it."""

    def __init__(self, gateway: Any) -> None:
        self.address: str = gateway.address
        self.port: int = gateway.port
        self.process_id: int = gateway.process_id

    def post(self, path: str = "/v1/restore", content: Any = b"image", **more: Any) -> httpx2.Response:
        return httpx2.post(f"{self.address}{path}", content=content, timeout=LIMIT_S, trust_env=False, **more)

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.get(f"{self.address}{path}", timeout=LIMIT_S, trust_env=False, **more)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)

    def exchange(self, request: bytes) -> bytes:
        """Send it as it is; all that comes back until the other side hangs up."""
        with self.connect() as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture
def check_problem() -> Callable[[httpx2.Response, int, str], None]:
    """Whether an answer is a document as the service writes them, with the same title."""

    def check(response: httpx2.Response, status: int, code: str) -> None:
        problem = response.json()
        assert (response.status_code, problem["status"], problem["code"]) == (status, status, code)
        assert response.headers["content-type"] == "application/problem+json"
        assert problem.keys() == {"type", "title", "status", "detail", "code", "request_id"}
        assert problem["request_id"] == response.headers["x-request-id"]
        assert PROBLEMS.get(code, (status, problem["title"])) == (status, problem["title"])
        assert ("retry-after" in response.headers) == (status in (429, 503))

    return check


@pytest.fixture
def gateway(gateways: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Front]]:
    """Starts a gateway in front of upstreams; `settings` as in tests/benchmarks/gateway.py."""
    if gateways.find_nginx() is None:
        pytest.skip("there is no nginx: run 'make nginx', or install it")
    with ExitStack() as stack:

        def start(*upstreams: Upstream | str, folder: Path = tmp_path, **settings: Any) -> Front:
            addresses = [one if isinstance(one, str) else one.address for one in upstreams]
            return Front(stack.enter_context(gateways.Gateway(addresses, folder, **settings)))

        yield start


@pytest.fixture
def logged(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """The lines of the access log so far."""

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]

    return read


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, unencrypted = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(signed.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, unencrypted))
    return folder / "cert.pem", folder / "key.pem"
