"""A Ray cluster over several hosts, with its store on another, and a user on yet another; see `hosts`."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import Host, network

from kintsugi.processes import wait_until

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
GCS, DASHBOARD, S3, ENDPOINT = 6379, 8265, 8333, 8000
WORKERS = ("one", "two")
UP_S = 120.0


@dataclass
class Cluster:
    """The hosts `head`, `one`, `two`, `store` and `user`; what runs on them writes to `logs`."""

    hosts: Mapping[str, Host]
    folder: Path
    cpus: Mapping[str, int]
    variables: dict[str, str]
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Of the dashboard and the Jobs API."""
        return f"http://{self.hosts['head'].address}:{DASHBOARD}"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def start_ray(self, name: str) -> None:
        """Ray on a host, as the start commands of `ray_cluster.yaml` would."""
        host, head = self.hosts[name], self.hosts["head"]
        where = (
            ["--head", f"--port={GCS}", f"--dashboard-host={host.address}", "--include-dashboard=true"]
            if name == "head"
            else [f"--address={head.address}:{GCS}"]
        )
        own = ["--block", "--disable-usage-stats", "--log-color=false", f"--node-ip-address={host.address}"]
        command = [str(BIN / "ray"), "start", *where, *own, f"--num-cpus={self.cpus[name]}"]
        self.running[name] = host.start(command, self.logs / f"ray-{name}.log", self.variables)

    def stop_ray(self, name: str) -> None:
        process = self.running.pop(name)
        process.terminate()
        process.wait(60)

    def alive(self) -> set[str]:
        """The addresses of Ray's nodes, as the head sees them."""
        answer = self.ask_dashboard("/nodes?view=summary")
        nodes = json.loads(answer)["data"]["summary"] if answer else []
        raylets = [node["raylet"] for node in nodes]
        return {raylet["nodeManagerAddress"] for raylet in raylets if raylet.get("state") == "ALIVE"}

    def wait_for(self, *names: str) -> None:
        wanted = {self.hosts[name].address for name in names}
        if not wait_until(lambda: wanted <= self.alive(), UP_S):
            raise RuntimeError(f"{wanted - self.alive()} did not join: see {self.logs}")

    def ask_dashboard(self, path: str) -> str:
        """The body of an answer to the user, or nothing."""
        code = (
            "import os, sys, urllib.request as u; "
            "token = {'Authorization': 'Bearer ' + open(os.environ['RAY_AUTH_TOKEN_PATH']).read()}; "
            "print(u.urlopen(u.Request(sys.argv[1], headers=token), timeout=5).read().decode())"
        )
        done = self.hosts["user"].run(
            [sys.executable, "-c", code, self.address + path], self.variables, check=False, timeout=30
        )
        return done.stdout

    def kintsugi(self, *command: str, timeout: float = 600, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """A command of the user's; the cluster is reached over the Jobs API only."""
        done = self.hosts["user"].run(
            [sys.executable, "-m", "kintsugi.cli", *command], self.variables, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"kintsugi {' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done

    def submit(self, *command: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """A verb of kintsugi as a job of the cluster, followed to its end."""
        return self.kintsugi("submit", "--address", self.address, "--", *command, **options)


@contextmanager
def cluster(folder: Path, cpus: Mapping[str, int] | None = None) -> Iterator[Cluster]:
    """Ray on `head` (which runs no work), `one` and `two`, S3 on `store`."""
    (folder / "logs").mkdir(parents=True)
    with network(["head", *WORKERS, "store", "user", "stranger"]) as hosts:
        made = Cluster(hosts, folder, {"head": 0, **dict.fromkeys(WORKERS, 1), **(cpus or {})}, {})
        made.variables |= _variables(folder, hosts)
        _start_store(made)
        made.start_ray("head")
        made.wait_for("head")
        for name in WORKERS:
            made.start_ray(name)
        made.wait_for("head", *WORKERS)
        yield made


def _variables(folder: Path, hosts: Mapping[str, Host]) -> dict[str, str]:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    endpoint = f"http://{hosts['store'].address}:{S3}"
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",
        "KINTSUGI_STORE": "s3://kintsugi",
        "KINTSUGI_CACHE": str(folder / "cache"),
        "KINTSUGI_HOME": str(folder / "home"),
        "KINTSUGI_ALLOW_PLAIN_S3": "1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(32),
        "AWS_DEFAULT_REGION": "us-east-1",
        "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ("platform", "tune", "serve")),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "*"),
    }


def _start_store(made: Cluster) -> None:
    host, data = made.hosts["store"], made.folder / "s3"
    data.mkdir()
    keys = {"accessKey": made.variables["AWS_ACCESS_KEY_ID"], "secretKey": made.variables["AWS_SECRET_ACCESS_KEY"]}
    config = made.folder / "s3.json"
    config.touch(mode=0o600)
    config.write_text(
        json.dumps(
            {"identities": [{"name": "user", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}]}
        )
    )
    command = [
        str(BIN / "weed"), "server", f"-dir={data}", f"-ip={host.address}", f"-ip.bind={host.address}",
        "-master.telemetry=false", "-volume.max=20", "-master.volumeSizeLimitMB=256",
        "-s3", f"-s3.port={S3}", f"-s3.config={config}",
    ]  # fmt: skip
    host.start(command, made.logs / "store.log")
    code = "from kintsugi.storage import S3Store; S3Store('s3://kintsugi').create_bucket()"

    def there() -> bool:
        return made.hosts["user"].run([sys.executable, "-c", code], made.variables, check=False).returncode == 0

    if not wait_until(there, UP_S):
        raise RuntimeError(f"the store did not come up: see {made.logs}")
