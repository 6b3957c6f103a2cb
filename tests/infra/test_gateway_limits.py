"""Whom the gateway does not let hold it up, TLS, and how it runs; with the real nginx on loopback."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import httpx2
import psutil
import pytest

from kintsugi.errors import StackError
from kintsugi.processes import accepts, wait_until

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0
CANARY = "canary-7Jt2pWq"


def read_until_cut(connection: socket.socket) -> None:
    """Raises TimeoutError if the other side holds on."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        return


# Who holds it up


def test_a_client_that_trickles_its_headers_is_cut_off(gateway: Any, upstream: Any) -> None:
    with gateway(upstream(), header_timeout="1s").connect() as connection:
        connection.sendall(b"POST /v1/restore HTTP/1.1\r\nHost: x\r\n")
        connection.settimeout(0.2)
        for number in range(int(LIMIT_S / 0.2)):
            try:
                connection.sendall(b"X-%d: 1\r\n" % number)
                assert connection.recv(4096) == b""
                return
            except TimeoutError:
                continue
            except ConnectionError:
                return
    pytest.fail("it went on for as long as it liked")


def test_a_client_that_stops_in_the_body_is_cut_off_and_never_seen_by_the_service(
    gateway: Any, upstream: Any, logged: Any
) -> None:
    behind = upstream()
    with gateway(behind, body_timeout="500ms").connect() as connection:
        connection.sendall(b"POST /v1/restore HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + bytes(999))
        read_until_cut(connection)
    assert wait_until(lambda: [line["status"] for line in logged()] == [408], LIMIT_S)
    assert behind.received == []


def test_an_address_holds_only_so_many_requests_at_once(gateway: Any, upstream: Any, check_problem: Any) -> None:
    front = gateway(upstream(), requests_per_address="2")
    opening = b"POST /v1/restore HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    with front.connect() as first, front.connect() as second:
        for connection in (first, second):
            connection.sendall(opening)
            assert connection.recv(4096).startswith(b"HTTP/1.1 100")
        check_problem(front.post(), 429, "rate_limited")
        first.sendall(b"image")
        assert first.recv(4096).startswith(b"HTTP/1.1 200")
        assert wait_until(lambda: front.post().status_code == 200, LIMIT_S)


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ({"Authorization": "Bearer a"}, {"Authorization": "Bearer b"}),
        ({"X-API-Key": "a"}, {"X-API-Key": "b"}),
        ({"Authorization": "Basic YTpi"}, {"Authorization": "Basic YTpj"}),
    ],
)
def test_keys_are_limited_each_for_itself(
    gateway: Any, upstream: Any, mine: dict[str, str], other: dict[str, str], check_problem: Any
) -> None:
    behind = upstream()
    front = gateway(behind, key_rate="1r/m", key_burst="1")
    assert [front.post(headers=mine).status_code for _ in range(2)] == [200, 200]
    check_problem(front.post(headers=mine), 429, "rate_limited")
    assert front.post(headers=other).status_code == 200
    assert len(behind.received) == 3


@pytest.mark.parametrize("disguise", [{"Authorization": "bearer   a"}, {"Authorization": "x", "X-API-Key": "a"}])
def test_a_key_in_another_disguise_is_the_same_key(gateway: Any, upstream: Any, disguise: dict[str, str]) -> None:
    front = gateway(upstream(), key_rate="1r/m", key_burst="1")
    assert [front.post(headers={"Authorization": "Bearer a"}).status_code for _ in range(2)] == [200, 200]
    assert front.post(headers=disguise).status_code == 429


def test_an_address_that_makes_up_keys_is_limited_as_an_address(gateway: Any, upstream: Any) -> None:
    front = gateway(upstream(), key_rate="1r/m", key_burst="1", address_rate="1r/m", address_burst="3")
    statuses = [front.post(headers={"X-API-Key": str(number)}).status_code for number in range(5)]
    assert statuses == [200, 200, 200, 200, 429]


def test_what_is_not_http_gets_a_problem_too(gateway: Any, upstream: Any) -> None:
    front = gateway(upstream())
    for request in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000 + b"\r\n\r\n"):
        answer = front.exchange(request)
        assert (
            answer.startswith(b"HTTP/1.1 400") and json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "bad_request"
        )


# TLS


@pytest.fixture
def trusting(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[0]))


def test_tls_is_spoken_with_the_certificate_and_http_2_offered(
    gateway: Any, upstream: Any, certificate: tuple[Path, Path], trusting: ssl.SSLContext, logged: Any
) -> None:
    behind = upstream()
    front = gateway(behind, certificate=certificate)
    assert front.post(verify=trusting).status_code == 200
    assert behind.received[0].headers["x-forwarded-proto"] == "https"
    assert wait_until(lambda: [line["tls"] for line in logged()] == ["TLSv1.3"], LIMIT_S)
    trusting.set_alpn_protocols(["h2"])
    with front.connect() as plain, trusting.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
        assert wrapped.selected_alpn_protocol() == "h2"


def test_plain_http_on_the_port_of_tls_is_refused(
    gateway: Any, upstream: Any, certificate: tuple[Path, Path], check_problem: Any
) -> None:
    front = gateway(upstream(), certificate=certificate)
    check_problem(httpx2.get(front.address.replace("https", "http"), trust_env=False), 400, "bad_request")


def test_tls_older_than_1_2_is_refused(
    gateway: Any, upstream: Any, certificate: tuple[Path, Path], trusting: ssl.SSLContext
) -> None:
    front = gateway(upstream(), certificate=certificate)
    trusting.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        trusting.minimum_version = trusting.maximum_version = ssl.TLSVersion.TLSv1_1
    with front.connect() as plain, pytest.raises(ssl.SSLError, match=r"(?i)alert.protocol.version"):
        trusting.wrap_socket(plain, server_hostname="127.0.0.1")


# How it runs


def test_no_key_and_no_image_is_left_in_its_folder(
    gateway: Any, upstream: Any, reply: Any, tmp_path: Path, logged: Any
) -> None:
    front = gateway(upstream(reply(status=None)), max_body="4m", key_rate="1r/m", key_burst="1")
    headers = {"Authorization": f"Bearer {CANARY}", "X-API-Key": CANARY, "Cookie": CANARY, "Idempotency-Key": CANARY}
    for size in (3_000_000, 10_000_000, 10, 10):
        front.post(f"/v1/restore?api_key={CANARY}", CANARY.encode() * (size // len(CANARY)), headers=headers)
    front.get(f"/nowhere?api_key={CANARY}", headers=headers)
    assert wait_until(lambda: len(logged()) == 5, LIMIT_S)
    assert {line["status"] for line in logged()} == {503, 413, 429, 404}
    assert {(line["method"], line["path"]) for line in logged()} == {("POST", "/v1/restore"), ("GET", "/nowhere")}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"access.log", "nginx.conf", "nginx.pid"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_nginx_takes_the_shipped_settings(gateways: ModuleType, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    if gateways.find_nginx() is None:
        pytest.skip("there is no nginx: run 'make nginx', or install it")
    tls = "ssl_certificate {}; ssl_certificate_key {};".format(*certificate)
    changed = {"GATEWAY_FOLDER": str(tmp_path), "GATEWAY_TLS": tls}
    command = [gateways.INFRA / "start", "-t"]
    done = subprocess.run(command, env=os.environ | changed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "${GATEWAY" not in (tmp_path / "nginx.conf").read_text().partition("daemon")[2]


def test_a_setting_that_is_wrong_or_unknown_is_named(gateway: Any, upstream: Any) -> None:
    with pytest.raises(StackError, match="client_max_body_size"):
        gateway(upstream(), max_body="much")
    with pytest.raises(StackError, match="GATEWAY_MAX_BODDY"):
        gateway(upstream(), max_boddy="1m")


def test_a_stop_that_asks_politely_lets_the_request_under_way_finish(gateway: Any, upstream: Any, reply: Any) -> None:
    asked, may_answer = threading.Event(), threading.Event()

    def answer(_: Any) -> Any:
        asked.set()
        may_answer.wait(LIMIT_S)
        return reply()

    front = gateway(upstream(answer))
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(front.post)
        assert asked.wait(LIMIT_S)
        os.kill(front.process_id, signal.SIGQUIT)
        assert wait_until(lambda: not accepts(front.port), LIMIT_S)
        may_answer.set()
        assert response.result().content == b"restored"


def test_it_runs_as_a_user_who_may_write_to_its_folder_only(gateways: ModuleType, gateway: Any, upstream: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    nobody = 65534
    with TemporaryDirectory() as name:
        tree, folder = Path(name), Path(name) / "run"
        shutil.copytree(gateways.INFRA, tree / "infra/gateway")
        (tree / ".kintsugi/debian/usr/sbin").mkdir(parents=True)
        shutil.copy(gateways.find_nginx(), tree / ".kintsugi/debian/usr/sbin/nginx")
        folder.mkdir()
        os.chown(folder, nobody, nobody)
        tree.chmod(0o755)
        behind = upstream()
        front = gateway(behind, folder=folder, start=tree / "infra/gateway/start", user_id=nobody)
        master = psutil.Process(front.process_id)
        body = os.urandom(5_000_000)
        assert front.post(content=body).status_code == 200
        assert behind.received[0].body == body
        assert {process.uids().effective for process in [master, *master.children()]} == {nobody}


def test_every_setting_is_explained_and_used(gateways: ModuleType) -> None:
    template = (ROOT / "infra/gateway/nginx.conf.template").read_text()
    shipped = gateways.shipped_settings().keys()
    assert shipped == set(re.findall(r"\$\{(GATEWAY_\w+)\}", template))
    assert shipped <= set(re.findall(r"GATEWAY_\w+", (ROOT / "docs/gateway.md").read_text()))
