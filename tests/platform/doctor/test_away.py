import json
import socket
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest

from kintsugi import store_check
from kintsugi.doctor import away
from kintsugi.errors import StoreError
from kintsugi.storage import MemoryStore, ObjectStore

Serve = Callable[[Mapping[str, tuple[int, bytes]]], str]


@pytest.fixture
def gcs() -> Iterator[str]:
    """An address that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text("f" * 64)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    return path


def test_a_token_is_judged_by_its_mode_and_length_and_never_told(token: Path) -> None:
    found = away.token()
    assert found is not None and found.state == "ok" and "ffff" not in found.tells
    token.chmod(0o644)
    found = away.token()
    assert found is not None and (found.state, found.mend) == ("problem", f"run 'chmod 600 {token}'")
    token.chmod(0o600)
    token.write_text("hunter2")
    found = away.token()
    assert found is not None and found.state == "problem" and "hunter2" not in found.tells + found.mend


def test_without_token_mode_there_is_nothing_to_judge() -> None:
    assert away.token() is None


def test_no_cluster_is_a_note_and_one_that_is_away_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert away.cluster().state == "note" and away.versions() is None
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert away.cluster().tells == "nothing answers at 127.0.0.1:1"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert away.cluster().state == "note"


@pytest.mark.parametrize(("status", "state"), [(401, "ok"), (200, "problem"), (404, "note")])
def test_a_cluster_is_judged_by_what_its_dashboard_says_without_a_token(
    gcs: str, token: Path, serve_http: Serve, monkeypatch: pytest.MonkeyPatch, status: int, state: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", gcs)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", serve_http({"/api/version": (status, b"{}")}))
    assert away.cluster().state == state
    monkeypatch.setenv("KINTSUGI_ALLOW_OPEN_CLUSTER", "1")
    assert away.cluster().state == ("warning" if state == "problem" else state)


def test_a_cluster_that_wants_a_token_where_none_is_set_says_how_to_set_it(
    gcs: str, serve_http: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", gcs)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", serve_http({"/api/version": (401, b"")}))
    assert away.cluster().state == "problem" and "RAY_AUTH_MODE=token" in away.cluster().mend


def test_another_ray_on_the_cluster_is_a_problem_that_names_both(
    serve_http: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = metadata.version("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for there, state in ((here, "ok"), ("2.9.0", "problem")):
        answers = {"/api/version": (200, json.dumps({"ray_version": there}).encode())}
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", serve_http(answers))
        found = away.versions()
        assert found is not None and found.state == state
        assert here in found.tells and (state == "ok" or f"ray=={there}" in found.mend)


def test_a_token_that_the_cluster_refuses_is_a_problem(serve_http: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", serve_http({"/api/version": (403, b"")}))
    found = away.versions()
    assert found is not None and (found.state, found.tells) == ("problem", "the cluster refuses this token")


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("10.0.0.1:6379", "http://10.0.0.1:8265"),
        ("ray://head:10001", "http://head:8265"),
        ("[fd00::1]:6379", "http://[fd00::1]:8265"),
    ],
)
def test_a_dashboard_that_nobody_names_is_sought_on_the_usual_port(
    monkeypatch: pytest.MonkeyPatch, address: str, url: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert away.dashboard_url() == url


def test_a_store_in_a_folder_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert away.store().state == "note" and away.transport() is None and away.clock() is None
    monkeypatch.setenv("KINTSUGI_STORE", str(tmp_path / "missing"))
    assert away.store().state == "warning"
    assert not (tmp_path / "missing").exists()
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("KINTSUGI_STORE", str(tmp_path / "store"))
    assert away.store().state == "ok"
    assert not [path for path in (tmp_path / "store").iterdir() if not path.name.startswith(".kintsugi-")]


def test_a_store_that_breaks_its_conditions_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overwriting(MemoryStore):
        def put(
            self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
        ) -> None:
            super().put(key, data)

    stores: dict[str, ObjectStore] = {"memory://": Overwriting()}
    monkeypatch.setattr(away, "open_store", lambda uri, patience: stores[uri])
    monkeypatch.setenv("KINTSUGI_STORE", "memory://")
    found = away.store()
    assert found.state == "problem" and "If-None-Match is ignored" in found.tells


def test_a_store_that_refuses_the_credentials_says_which_variables_to_check(
    serve_http: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINTSUGI_STORE", "s3://bucket/prefix")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    found = away.store()
    assert found.state == "problem" and "AWS_ENDPOINT_URL" in found.mend
    assert "hunter2" not in found.tells


def test_an_error_of_the_store_becomes_a_finding_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: ObjectStore) -> str | None:
        raise StoreError("s3://b refused the credentials (403): check AWS_ACCESS_KEY_ID")

    monkeypatch.setattr(store_check, "fault", refuse)
    monkeypatch.setenv("KINTSUGI_STORE", "s3://b")
    found = away.store()
    assert (found.tells, found.mend) == ("s3://b refused the credentials (403)", "check AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize(
    ("endpoint", "setting", "state"),
    [
        ("http://127.0.0.1:8333", "", "ok"),
        ("https://10.0.0.1", "", "ok"),
        ("http://10.0.0.1:9000", "", "problem"),
        ("http://10.0.0.1:9000", "1", "warning"),
    ],
)
def test_plain_http_to_the_store_is_a_problem_beyond_loopback(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, setting: str, state: str
) -> None:
    monkeypatch.setenv("KINTSUGI_STORE", "s3://bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("KINTSUGI_ALLOW_PLAIN_S3", setting)
    found = away.transport()
    assert found is not None and found.state == state and bool(found.mend) == (state != "ok")


def test_the_stores_clock_is_read_from_its_answers(serve_http: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINTSUGI_STORE", "s3://bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", serve_http({}))
    found = away.clock()
    assert found is not None and found.state == "ok"


@pytest.mark.parametrize(
    ("seconds", "state", "told"),
    [(3, "ok", "agrees"), (-120, "warning", "120 s behind"), (2000, "problem", "2000 s ahead of")],
)
def test_a_clock_that_is_off_is_told_before_s3_refuses_it(seconds: float, state: str, told: str) -> None:
    found = away.clock_off(seconds)
    assert found.state == state and told in found.tells
