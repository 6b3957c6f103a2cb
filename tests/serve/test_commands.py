import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from kintsugi import local
from kintsugi.cli import main
from kintsugi.errors import ConfigError, ModelNotFound, StackError
from kintsugi.storage import LocalStore
from kintsugi_serve import commands
from kintsugi_serve.access.keys import read_keys
from kintsugi_serve.ingress.callers import Caller, Callers


@pytest.fixture(autouse=True)
def no_stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local, "home_folder", lambda: tmp_path / "home")
    monkeypatch.setenv("KINTSUGI_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def other_server() -> Iterator[int]:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = HTTPServer(("127.0.0.1", 0), Other)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_model_that_does_not_exist_stops_before_the_cluster(store: LocalStore) -> None:
    with pytest.raises(ModelNotFound, match="nothing to serve"):
        commands.serve(model="unet@production", port=_free_port())


def test_a_model_must_be_named() -> None:
    with pytest.raises(ConfigError, match="--model"):
        commands.serve()


def test_a_host_that_others_reach_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="--keys FILE"):
        commands.serve(model="unet", host="0.0.0.0")


def test_a_key_itself_is_not_taken_for_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n  - {tenant: line, sha256: my key}\n")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="64 hex digits"):
        commands.serve(model="unet", keys=file)


def test_a_key_that_was_made_opens_what_its_entry_is_read_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "key", "line-3"]) == 0
    key, _, entry = capsys.readouterr().out.partition("\n\n")
    file = tmp_path / "keys.yaml"
    file.write_text(entry)
    file.chmod(0o600)
    caller = Callers(read_keys(file)).identify({"x-api-key": key})
    assert caller == Caller("line-3")
    assert key not in entry


def test_a_key_of_a_name_that_is_no_tenant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "key", "Line 3"]) == 1
    assert "use a to z" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"), [("threads=0", "threads"), ("treads=2", "treads"), ("threads", "key=value"), ("x=[", "YAML")]
)
def test_a_setting_that_is_wrong_is_named(given: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        commands.serve(model="unet", sets=[given])


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(ConfigError, match="--min-replicas"):
        commands.serve(model="unet", min_replicas=3, max_replicas=2)


def test_a_port_that_another_program_holds_is_named(
    store: LocalStore, tmp_path: Path, publish: object, other_server: int
) -> None:
    assert callable(publish)
    publish(store, tmp_path / "a")
    with pytest.raises(StackError, match=f"port {other_server} .* taken"):
        commands.serve(model="unet", port=other_server)


def test_no_cluster_is_a_clear_error(store: LocalStore, tmp_path: Path, publish: object) -> None:
    assert callable(publish)
    publish(store, tmp_path / "a")
    for arguments in ({"model": "unet", "port": _free_port()}, {"stop": True}):
        with pytest.raises(StackError, match="kintsugi up"):
            commands.serve(**arguments)  # type: ignore[arg-type]


def test_a_service_that_never_gets_ready_is_a_clear_error() -> None:
    with pytest.raises(StackError, match="not ready within"):
        commands._wait_until_ready(f"http://127.0.0.1:{_free_port()}", 0.3)


def test_the_verb_loads_neither_ray_nor_torch() -> None:
    import subprocess

    code = "import sys, kintsugi_serve.commands; sys.exit(bool({'ray', 'torch', 'fastapi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
