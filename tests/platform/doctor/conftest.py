"""An environment in which nothing of whoever runs the tests is seen."""

from pathlib import Path

import pytest

NAMES = (
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"),
    *("RAY_AUTH_TOKEN_PATH", "KINTSUGI_LOCAL_STORE", "KINTSUGI_ALLOW_OPEN_CLUSTER", "KINTSUGI_ALLOW_PLAIN_S3"),
    *("AWS_SESSION_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"),
    "RAY_USAGE_STATS_ENABLED",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, closed to others."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what a command writes there is undone, too
        monkeypatch.delenv(name)
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "hunter2"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("KINTSUGI_HOME", str(home))
    monkeypatch.setenv("HOME", str(tmp_path))
    return home
