"""A Ray cluster over several hosts, with its store on another, and a user on yet another; see `hosts`.

Every node is started as `infra/hosts` starts it: with token, TLS and firewall.
"""

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import Host, network

from kintsugi.processes import wait_until

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BIN = Path(sys.executable).parent
START = ROOT / "infra/hosts"
DASHBOARD, S3, REDIS, ENDPOINT = 8265, 8333, 6379, 8000
WORKERS = ("one", "two")
UP_S = 120.0


@dataclass
class Cluster:
    """The hosts `head`, `one`, `two`, `store` and `user`; what runs on them writes to `logs`."""

    hosts: Mapping[str, Host]
    folder: Path
    cpus: Mapping[str, float]
    variables: dict[str, str]
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Of the dashboard and the Jobs API."""
        return f"http://{self.hosts['head'].address}:{DASHBOARD}"

    def card(self, log: str) -> dict[str, Any]:
        """Of the model that a job published, as its log tells."""
        (ref,) = set(re.findall(r"published (\w+@\d+)", log))
        return json.loads(self.kintsugi("models", "show", ref, "--json").stdout)["card"]

    def endpoint(self, name: str) -> str:
        return f"http://{self.hosts[name].address}:{ENDPOINT}"

    def manifests(self, prefix: str) -> int:
        """How many whole folders the store has below a prefix."""
        code = (
            "import sys; from kintsugi.manifest import MANIFEST; from kintsugi.storage import open_store; "
            "print(sum(found.key.endswith(MANIFEST) for found in open_store(sys.argv[1]).list(sys.argv[2])))"
        )
        return int(self.python(code, self.variables["KINTSUGI_STORE"], prefix).stdout)

    def python(
        self, *command: str, on: str = "user", env: Mapping[str, str] | None = None, timeout: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        """A file or a line of code (with `-c` before it left out), on a host."""
        first = [] if command[0].endswith(".py") else ["-c"]
        return self.hosts[on].run([sys.executable, *first, *command], {**self.variables, **(env or {})}, timeout)

    def open_ports(self) -> list[str]:
        """HOST:PORT of all that listens on Ray's hosts beyond their loopback."""
        hosts = [self.hosts[name] for name in ("head", *WORKERS)]
        return [
            f"{host.address}:{port}"
            for host in hosts
            for address, port in host.listening()
            if address not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        ]

    @property
    def caller(self) -> Path:
        return HERE / "caller.py"

    def told_to(self, name: str, ports: Sequence[str]) -> dict[str, list[str]]:
        """What open ports tell a host that has no secret; see `probe`."""
        return json.loads(self.python(str(HERE / "probe.py"), *ports, on=name, env={"RAY_AUTH_MODE": ""}).stdout)

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def start_ray(self, name: str) -> None:
        """As the unit of `infra/hosts` does. It ends when Ray does."""
        cpus = [f"--num-cpus={self.cpus[name]}"] if name in self.cpus else []
        command = [str(START / "start-ray"), *cpus]
        self.running[name] = self.hosts[name].start(command, self.logs / f"ray-{name}.log", self.of(name))

    def of(self, name: str) -> dict[str, str]:
        """The environment of Ray on a node."""
        address = self.hosts[name].address
        certificates = self.folder / "certificates" / address
        return {
            **self.variables,
            "KINTSUGI_ADDRESS": address,
            "KINTSUGI_ROLE": "cpu",
            "RAY_USE_TLS": "1",
            "RAY_TLS_CA_CERT": str(certificates / "ca.pem"),
            "RAY_TLS_SERVER_CERT": str(certificates / "node.pem"),
            "RAY_TLS_SERVER_KEY": str(certificates / "node.key"),
            **({"RAY_REDIS_ADDRESS": f"{self.hosts['store'].address}:{REDIS}"} if name == "head" else {}),
        }

    def close_firewall(self, name: str) -> None:
        self.hosts[name].run(["bash", "-c", f"{START / 'firewall'} | nft -f -"], self.of(name))

    def kill(self, name: str) -> None:
        """Kill every process of a host at once."""
        self.hosts[name].run(["kill", "-KILL", "-1"], check=False)
        self.running.pop(name).wait(60)

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
def cluster(folder: Path, cpus: float = 1) -> Iterator[Cluster]:
    """Ray on `head` (which runs no work), and on `one` and `two` with so many CPUs each; S3 and Redis on `store`."""
    (folder / "logs").mkdir(parents=True)
    with network(["head", *WORKERS, "store", "user", "stranger"]) as hosts:
        made = Cluster(hosts, folder, dict.fromkeys(WORKERS, cpus), {})
        made.variables |= _variables(folder, hosts)
        certificates = [str(START / "certificates"), str(folder / "certificates")]
        subprocess.run([*certificates, *(hosts[name].address for name in ("head", *WORKERS))], check=True)
        _start_store(made)
        _start_redis(made)
        for name in ("head", *WORKERS):
            made.close_firewall(name)
            made.start_ray(name)
            made.wait_for(name)
        yield made


def _variables(folder: Path, hosts: Mapping[str, Host]) -> dict[str, str]:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    endpoint = f"http://{hosts['store'].address}:{S3}"
    return {
        "KINTSUGI_HEAD": hosts["head"].address,
        "KINTSUGI_NODES": " ".join(hosts[name].address for name in ("head", *WORKERS)),
        "KINTSUGI_USERS": hosts["user"].address,
        "KINTSUGI_REDIS_PASSWORD": secrets.token_hex(32),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "10",
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


def _start_redis(made: Cluster) -> None:
    host, config = made.hosts["store"], made.folder / "redis.conf"
    config.touch(mode=0o600)
    password = made.variables["KINTSUGI_REDIS_PASSWORD"]
    settings = (f"bind {host.address}", f"port {REDIS}", f"requirepass {password}", 'save ""', f"dir {made.folder}")
    config.write_text("".join(f"{line}\n" for line in settings))
    host.start(["redis-server", str(config)], made.logs / "redis.log")

    def there() -> bool:
        return host.run(["redis-cli", "-h", host.address, "ping"], check=False).returncode == 0

    if not wait_until(there, UP_S):
        raise RuntimeError(f"Redis did not come up: see {made.logs}")


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
