"""What start-up refuses: each door opened, told in one sentence, and the setting that leaves it open on purpose."""

from collections.abc import Callable, Mapping
from pathlib import Path

import boto3
import pytest

from kintsugi import doors
from kintsugi.errors import ConfigError, StackError, StoreError, StoreUnavailable
from kintsugi.storage import LocalStore, MemoryStore, S3Store

TOKEN = "f" * 64
Serve = Callable[[Mapping[str, tuple[int, bytes]]], str]


@pytest.fixture(autouse=True)
def _closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", doors.OPEN_CLUSTER, doors.PLAIN_S3):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token file as it should be, where Ray looks for it."""
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.touch(0o600)
    path.write_text(TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return path


def test_a_private_long_token_passes(token: Path) -> None:
    doors.check_token()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_token_that_others_can_read_is_refused_with_the_command_that_mends_it(token: Path, mode: int) -> None:
    token.chmod(mode)
    with pytest.raises(StackError, match=rf"can be read by others \(mode {mode:04o}\): run 'chmod 600 {token}'"):
        doors.check_token()


def test_the_path_of_the_environment_wins_over_the_usual_place(
    token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_text(TOKEN)
    other.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    with pytest.raises(StackError, match=f"chmod 600 {other}"):
        doors.check_token()


def test_a_short_token_is_refused_and_not_told(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token.write_text("hunter2\n")
    with pytest.raises(StackError, match="has 7 characters and can be guessed") as refused:
        doors.check_token()
    assert "hunter2" not in str(refused.value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    with pytest.raises(StackError, match="RAY_AUTH_TOKEN has 3 characters"):
        doors.check_token()


def test_a_missing_token_says_where_it_is_looked_for(token: Path) -> None:
    token.unlink()
    with pytest.raises(StackError, match=r"auth_token cannot be read .* copy the cluster's Ray token there"):
        doors.check_token()


def test_without_token_mode_no_file_is_asked_for() -> None:
    doors.check_token()


def test_a_cluster_on_loopback_is_nobody_elses_business() -> None:
    doors.check_cluster("127.0.0.1:6379", "127.0.0.1:8265")
    doors.check_cluster("[::1]:6379", "localhost:8265")


def test_a_cluster_beyond_loopback_without_a_token_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StackError, match=r"10\.0\.0\.1:6379 runs the code of anyone .*RAY_AUTH_MODE=token"):
        doors.check_cluster("10.0.0.1:6379", "")
    monkeypatch.setenv(doors.OPEN_CLUSTER, "1")
    doors.check_cluster("10.0.0.1:6379", "")


@pytest.mark.parametrize(("status", "refused"), [(200, True), (401, False), (403, False)])
def test_a_cluster_is_refused_if_its_dashboard_answers_although_we_have_a_token(
    token: Path, serve_http: Serve, status: int, refused: bool
) -> None:
    dashboard = serve_http({"/api/version": (status, b"{}")}).removeprefix("http://")
    if not refused:
        doors.check_cluster("10.0.0.1:6379", dashboard)
        return
    with pytest.raises(StackError, match="asks for no token"):
        doors.check_cluster("10.0.0.1:6379", dashboard)


@pytest.mark.parametrize(
    ("endpoint", "refused"),
    [
        ("http://10.0.0.1:8333", True),
        ("http://minio.plant:9000", True),
        ("https://minio.plant:9000", False),
        ("http://127.0.0.1:8333", False),
        ("http://localhost:8333", False),
        ("http://[::1]:8333", False),
        (None, False),
    ],
)
def test_plain_http_to_s3_is_refused_beyond_loopback_unless_allowed(
    monkeypatch: pytest.MonkeyPatch, endpoint: str | None, refused: bool
) -> None:
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    if not refused:
        doors.check_transport(S3Store("s3://bucket"))
        return
    with pytest.raises(ConfigError, match=r"is plain HTTP.*https://.*KINTSUGI_ALLOW_PLAIN_S3=1"):
        doors.check_transport(S3Store("s3://bucket"))
    monkeypatch.setenv(doors.PLAIN_S3, "1")
    doors.check_transport(S3Store("s3://bucket"))


def test_an_endpoint_of_the_aws_config_file_counts_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://10.0.0.1:9000\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it has read another file
    with pytest.raises(ConfigError, match=r"http://10\.0\.0\.1:9000 is plain HTTP"):
        doors.check_store("s3://bucket/config-file")


class Overwriting(MemoryStore):
    """Takes every write, whatever its condition."""

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        super().put(key, data)


class Failing(MemoryStore):
    def __init__(self, error: StoreError) -> None:
        super().__init__()
        self.error = error

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        raise self.error


def test_a_store_that_ignores_conditions_is_refused() -> None:
    with pytest.raises(StoreError, match=r"lets a second writer replace .* use a store with conditional writes"):
        doors.check_conditions(Overwriting())


def test_a_store_that_may_only_be_read_passes_and_one_that_is_away_does_not() -> None:
    doors.check_conditions(Failing(StoreError("AccessDenied")))
    with pytest.raises(StoreUnavailable, match="away"):
        doors.check_conditions(Failing(StoreUnavailable("away")))


def test_a_folder_is_not_written_to(tmp_path: Path) -> None:
    doors.check_store(str(tmp_path / "not" / "made"))
    assert not (tmp_path / "not").exists()
    doors.check_transport(LocalStore(tmp_path))


def test_nothing_answers_is_not_an_open_dashboard() -> None:
    assert not doors.is_open("http://127.0.0.1:1")
    assert not doors.is_open("http://not a host")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("localhost.plant", False),
        ("", False),
    ],
)
def test_loopback_is_told_from_all_else(host: str, loopback: bool) -> None:
    assert doors.is_loopback(host) is loopback
