"""What a host of one's own machines is started with; `tests/infra/hosts` starts a cluster by it."""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

INFRA = Path(__file__).parents[2] / "infra/hosts"
ENVIRONMENT = {
    "KINTSUGI_HEAD": "192.0.2.1",
    "KINTSUGI_ADDRESS": "192.0.2.2",
    "KINTSUGI_ROLE": "train",
    "KINTSUGI_NODES": "192.0.2.1 192.0.2.2",
    "RAY_AUTH_MODE": "token",
}


def run(name: str, *words: str, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    path = os.environ["PATH"]
    return subprocess.run(
        [str(INFRA / name), *words], env={"PATH": path, **(env or {})}, capture_output=True, text=True
    )


@pytest.fixture
def arguments(tmp_path: Path) -> Path:
    """A program of the name `ray` that prints what it is given."""
    program = tmp_path / "ray"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return tmp_path


def started(folder: Path, **more: str) -> list[str]:
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = run("start-ray", "--num-gpus=2", env={**ENVIRONMENT, **more, "PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_host_joins_the_head_under_its_own_address_and_role(arguments: Path) -> None:
    words = started(arguments, KINTSUGI_REDIS_PASSWORD="of the head only")
    assert words[:2] == ["start", "--address=192.0.2.1:6379"] and words[-2:] == ["--block", "--num-gpus=2"]
    assert {"--node-ip-address=192.0.2.2", "--labels=kintsugi.io/role=train"} < set(words)


def test_the_head_runs_no_work_whatever_role_it_is_given(arguments: Path) -> None:
    words = started(arguments, KINTSUGI_ADDRESS="192.0.2.1", KINTSUGI_REDIS_PASSWORD="secret")
    assert {"--head", "--num-cpus=0", "--labels=kintsugi.io/role=head", "--redis-password=secret"} < set(words)
    assert "--dashboard-host=192.0.2.1" in words


@pytest.mark.parametrize("name", ["KINTSUGI_HEAD", "KINTSUGI_ADDRESS", "KINTSUGI_ROLE", "RAY_AUTH_MODE"])
def test_a_start_without_a_setting_names_it(arguments: Path, name: str) -> None:
    path = f"{arguments}{os.pathsep}{os.environ['PATH']}"
    left = {key: value for key, value in ENVIRONMENT.items() if key != name}
    done = run("start-ray", env={**left, "PATH": path})
    assert done.returncode and name in done.stderr and not done.stdout


def test_certificates_are_one_authority_s_and_its_key_goes_to_no_host(tmp_path: Path) -> None:
    for addresses in (["192.0.2.1"], ["192.0.2.2", "2001:db8::3"]):
        done = run("certificates", str(tmp_path / "made"), *addresses)
        assert done.returncode == 0, done.stderr
    hosts = sorted(path for path in (tmp_path / "made").iterdir() if path.is_dir())
    assert [host.name for host in hosts] == ["192.0.2.1", "192.0.2.2", "2001:db8::3"]
    for host in hosts:
        assert {file.name for file in host.iterdir()} == {"ca.pem", "node.key", "node.pem"}
        assert {stat.S_IMODE(file.stat().st_mode) for file in host.iterdir()} == {0o600}
        verify = ["openssl", "verify", "-CAfile", str(tmp_path / "made/ca.pem"), "-verify_ip", host.name]
        assert subprocess.run([*verify, str(host / "node.pem")], capture_output=True, check=False).returncode == 0
    wrong = run("certificates", str(tmp_path / "made"), "worker-1")
    assert wrong.returncode == 2 and "is no IP address" in wrong.stderr


def test_the_firewall_names_nodes_and_users_and_nothing_else_comes_in() -> None:
    rules = run("firewall", env={**ENVIRONMENT, "KINTSUGI_USERS": "192.0.2.128/25"}).stdout
    assert "policy drop" in rules and "ip saddr { 192.0.2.1,192.0.2.2 } accept" in rules
    assert "ip saddr { 192.0.2.128/25 } tcp dport { 8000, 8265 } accept" in rules
    assert "8265" not in run("firewall", env=ENVIRONMENT).stdout
    none = run("firewall")
    assert none.returncode and "KINTSUGI_NODES" in none.stderr and not none.stdout


def test_the_environment_sets_what_the_files_read() -> None:
    given = set(re.findall(r"^#?([A-Z]\w+|RAY_\w+)=", (INFRA / "cluster.env").read_text(), re.MULTILINE))
    read = {
        name
        for file in ("start-ray", "firewall")
        for name in re.findall(r"\$\{?((?:KINTSUGI|RAY)_[A-Z_]+)", (INFRA / file).read_text())
    }
    assert len(read) > 5 and read <= given
    assert {"RAY_USE_TLS", "RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY"} <= given


def test_the_unit_is_one_of_systemd(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze: Debian's package systemd has it")
    unit = tmp_path / "kintsugi-ray.service"
    text = (INFRA / unit.name).read_text()
    # Elsewhere there is no such file, which is all that it would find.
    unit.write_text(text.replace("/opt/kintsugi/start-ray", str(INFRA / "start-ray")))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr
