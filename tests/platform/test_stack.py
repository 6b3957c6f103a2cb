"""What a recorded stack gives to the environment of a program."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kintsugi import processes, stack
from kintsugi.errors import StackError
from kintsugi.processes import ProcessRecord
from kintsugi.stack import Stack

VARIABLES = (
    *("KINTSUGI_STORE", "KINTSUGI_LOCAL_STORE", "KINTSUGI_HOME", "NO_PROXY", "no_proxy", "AWS_PROFILE"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_DEFAULT_REGION", "AWS_REGION", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"),
    *("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"),
    *("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_USAGE_STATS_ENABLED"),
)


@pytest.fixture(autouse=True)
def _environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `activate` writes is undone after the test."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[ProcessRecord]:
    """A running process that stands for the Ray head."""
    sleeps = [sys.executable, "-c", "import time; time.sleep(300)"]
    record = processes.start(sleeps, env=os.environ, folder=tmp_path, log=tmp_path / "head.log")
    yield record
    processes.stop(record, 10)


def record_stack(home: Path, s3: str | None = "http://127.0.0.1:1", head: ProcessRecord | None = None) -> Stack:
    stack.write_credentials(home)
    stack.write_token(home)
    recorded = Stack(
        s3_endpoint=s3,
        store_uri="s3://kintsugi" if s3 else "/a/store",
        ray_address="127.0.0.1:2",
        dashboard="http://127.0.0.1:3",
        tensorboard="http://127.0.0.1:4",
        endpoint="http://127.0.0.1:5",
        scratch=home / "scratch",
        processes={"ray": head} if head else {},
    )
    stack.save(home, recorded)
    return recorded


def test_a_saved_stack_is_found_as_it_was(tmp_path: Path, head: ProcessRecord) -> None:
    assert stack.find(tmp_path) is None
    saved = record_stack(tmp_path, head=head)
    assert stack.find(tmp_path) == saved


def test_a_record_that_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    stack.record_file(tmp_path).write_text('{"half":')
    with pytest.raises(StackError, match="delete it"):
        stack.find(tmp_path)


@pytest.mark.parametrize("name", ["credentials.json", "ray-token", "stack.json"])
def test_only_the_owner_can_read_what_is_secret(tmp_path: Path, name: str) -> None:
    record_stack(tmp_path)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_credentials_stay_and_the_token_changes(tmp_path: Path) -> None:
    record_stack(tmp_path)
    credentials, token = stack.credentials_file(tmp_path).read_bytes(), stack.token_file(tmp_path).read_bytes()
    record_stack(tmp_path)
    assert stack.credentials_file(tmp_path).read_bytes() == credentials
    assert stack.token_file(tmp_path).read_bytes() != token
    assert len(bytes.fromhex(token.decode())) * 8 >= 256


def test_unreadable_credentials_say_what_to_do(tmp_path: Path) -> None:
    recorded = record_stack(tmp_path)
    stack.credentials_file(tmp_path).write_text("{}")
    with pytest.raises(StackError, match="delete it"):
        stack.environment(recorded, tmp_path)


def test_activate_does_nothing_without_a_recorded_stack(tmp_path: Path) -> None:
    before = dict(os.environ)
    assert stack.activate(tmp_path) is None
    assert dict(os.environ) == before


def test_activate_sets_the_whole_environment_and_removes_what_would_win_over_it(
    tmp_path: Path, head: ProcessRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another account")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://another")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    monkeypatch.setenv("NO_PROXY", "intranet")
    recorded = record_stack(tmp_path, head=head)
    assert stack.activate(tmp_path) == recorded
    assert stack.environment(recorded, tmp_path).items() <= os.environ.items()
    assert os.environ["AWS_ENDPOINT_URL_S3"] == recorded.s3_endpoint
    assert os.environ["NO_PROXY"] == "intranet,127.0.0.1,localhost"
    assert "AWS_SESSION_TOKEN" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ


def test_activate_leaves_the_users_own_store_alone_and_still_names_the_cluster(
    tmp_path: Path, head: ProcessRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINTSUGI_STORE", "s3://mine")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "mine")
    record_stack(tmp_path, head=head)
    for _ in range(2):
        stack.activate(tmp_path)
        assert os.environ["KINTSUGI_STORE"] == "s3://mine"
        assert os.environ["AWS_SESSION_TOKEN"] == "mine"
        assert "AWS_ENDPOINT_URL" not in os.environ
        assert os.environ["RAY_ADDRESS"] == "127.0.0.1:2"


def test_activate_leaves_the_users_own_cluster_alone(
    tmp_path: Path, head: ProcessRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    record_stack(tmp_path, head=head)
    stack.activate(tmp_path)
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert "RAY_AUTH_MODE" not in os.environ
    assert os.environ["KINTSUGI_STORE"] == "s3://kintsugi"


def test_activate_names_no_cluster_whose_head_is_gone(tmp_path: Path) -> None:
    record_stack(tmp_path)
    stack.activate(tmp_path)
    assert "RAY_ADDRESS" not in os.environ
    assert os.environ["KINTSUGI_STORE"] == "s3://kintsugi"


def test_a_store_that_activate_set_is_not_taken_for_the_users_own(tmp_path: Path) -> None:
    record_stack(tmp_path)
    stack.activate(tmp_path)
    assert stack.own_store() is None


def test_a_stack_on_the_users_store_names_that_store_and_no_s3_server(tmp_path: Path) -> None:
    variables = stack.environment(record_stack(tmp_path, s3=None), tmp_path)
    assert variables["KINTSUGI_STORE"] == "/a/store"
    assert not [name for name in variables if name.startswith("AWS_")]


def test_the_home_folder_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stack.home_folder() == Path(".kintsugi")
    monkeypatch.setenv("KINTSUGI_HOME", "/elsewhere")
    assert stack.home_folder() == Path("/elsewhere")
