import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from kintsugi.inner_tls import grpc_environment


def greeting(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """What a client hears from a server that greets whom it lets in."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            try:
                with server.wrap_socket(connection, server_side=True) as wrapped:
                    wrapped.sendall(b"welcome")
            except ssl.SSLError:
                connection.close()

        greeter = threading.Thread(target=greet)
        greeter.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as plain,
                client.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
            ):
                return wrapped.recv(100)
        finally:
            greeter.join(10)


def contexts(path: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server that asks for the certificate, and a client that trusts it without having one."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    server.load_verify_locations(path)
    server.verify_mode = ssl.CERT_REQUIRED
    return server, ssl.create_default_context(cafile=path)


def test_who_has_the_certificate_is_let_in_and_nobody_else(tmp_path: Path) -> None:
    path = grpc_environment(tmp_path)["WEED_GRPC_CA"]
    server, client = contexts(path)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        greeting(server, client)
    client.load_cert_chain(path)
    assert greeting(server, client) == b"welcome"


def test_another_certificate_of_the_same_name_is_not_let_in(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    server, client = contexts(grpc_environment(tmp_path)["WEED_GRPC_CA"])
    client.load_cert_chain(grpc_environment(tmp_path / "other")["WEED_GRPC_CA"])
    with pytest.raises((ssl.SSLError, ConnectionError)):
        greeting(server, client)


def test_every_part_gets_the_one_file_which_only_its_owner_reads(tmp_path: Path) -> None:
    variables = grpc_environment(tmp_path)
    [path] = {Path(value) for value in variables.values()}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for part in ("MASTER", "VOLUME", "FILER", "S3", "CLIENT"):
        assert {f"WEED_GRPC_{part}_CERT", f"WEED_GRPC_{part}_KEY"} <= variables.keys()
    before = path.read_bytes()
    grpc_environment(tmp_path)
    assert path.read_bytes() != before
