"""The groups of `ray_cluster.yaml` under Ray's own autoscaler, with nodes that are processes of this machine."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from kintsugi import processes

ROOT = Path(__file__).parents[3]
FAKE_HEAD = "ray.head.default"
"""As Ray's fake provider calls the head, whatever the file calls it."""
FAKE_HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
FAKE = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
STORE_MEMORY = 80 * 2**20
FASTER = 100
LIMIT_S = 280.0
"""Nothing that is waited for here takes this long, not even on a busy machine."""


def scaled_down(config: Mapping[str, Any], gcs: str) -> dict[str, Any]:
    """The cluster file for Ray's fake provider.

    Groups keep their names, labels and kinds of resources. A machine has one CPU and one GPU at the most, there may be
    half as many machines, and they idle a hundredth of the time.
    """
    kinds = dict[str, dict[str, Any]]()
    for name, kind in config["available_node_types"].items():
        head = name == config["head_node_type"]
        idle = {"idle_timeout_s": kind["idle_timeout_s"] / FASTER} if "idle_timeout_s" in kind else {}
        resources = {resource: min(amount, 1) for resource, amount in kind["resources"].items()}
        kinds[FAKE_HEAD if head else name] = {
            **idle,
            "resources": {**resources, "object_store_memory": STORE_MEMORY},
            "labels": kind["labels"],
            "min_workers": kind.get("min_workers", 0),
            "max_workers": -(-kind.get("max_workers", 0) // 2),
            "node_config": {},
        }
    # By its class: the type of its own name reads a file that Ray's wheel lacks.
    provider = {
        "type": "external",
        "module": FAKE,
        "gcs_address": gcs,
        "head_node_id": FAKE_HEAD_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    return {
        "cluster_name": config["cluster_name"],
        "max_workers": config["max_workers"],
        "idle_timeout_minutes": config["idle_timeout_minutes"] / FASTER,
        "provider": provider,
        "head_node_type": FAKE_HEAD,
        "available_node_types": kinds,
        "auth": {},
        "cluster_synced_files": [],
        **{name: [] for name in config if name.endswith("_commands")},
    }


def role(node: Mapping[str, Any]) -> str:
    return node["labels"]["kintsugi.io/role"]


class Autoscaled:
    """A head, and what its autoscaler adds; asked over HTTP with the token, as the dashboard is."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.store = folder / "store"
        self.gcs, self.dashboard, *inner = processes.free_ports(6)
        scaled = scaled_down(config, f"127.0.0.1:{self.gcs}")
        self.groups = scaled["available_node_types"]
        # Ray's socket paths must stay below 107 bytes.
        self._folder, self._scratch = folder, Path(tempfile.mkdtemp(prefix="ka-", dir="/tmp"))
        (self._scratch / "token").touch(0o600)
        (self._scratch / "token").write_text(secrets.token_hex(32))
        (folder / "cluster.json").write_text(json.dumps(scaled))
        command, variables = self._head_command(*inner[:2]), self._head_variables(*inner[2:])
        self._head = processes.start(command, env=variables, folder=folder, log=folder / "head.log")
        if not processes.wait_until(lambda: not self._runs() or bool(self.nodes()), LIMIT_S) or not self._runs():
            told = processes.last_lines(folder / "head.log", 20)
            self.close()
            raise AssertionError(f"no head: {told}")

    def _head_command(self, client: int, agent: int) -> list[str]:
        return [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--log-color=false"),
            *("--node-ip-address=127.0.0.1", f"--port={self.gcs}", f"--temp-dir={self._scratch / 'ray'}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}", "--include-dashboard=true"),
            *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
            *("--num-cpus=0", "--num-gpus=0", f"--object-store-memory={STORE_MEMORY}"),
            f"--autoscaling-config={self._folder / 'cluster.json'}",
            f"--labels={','.join(f'{key}={value}' for key, value in self.groups[FAKE_HEAD]['labels'].items())}",
        ]

    def _head_variables(self, scaling: int, dashboard: int) -> dict[str, str]:
        return self._variables() | {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_ID,
            "RAY_NODE_TYPE_NAME": FAKE_HEAD,
            # As `ray up` starts a head, and as the manifests of KubeRay ask.
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": str(scaling),
            "DASHBOARD_METRIC_PORT": str(dashboard),
        }

    def _runs(self) -> bool:
        return processes.state(self._head) == "running"

    def _variables(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KINTSUGI_", "AWS_"))}
        return ours | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._scratch / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_worker_niceness": "0",
            "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
            "OMP_NUM_THREADS": "1",
            "KINTSUGI_STORE": str(self.store),
            "KINTSUGI_CACHE": str(self._folder / "cache"),
            "KINTSUGI_HOME": str(self._folder / "home"),
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }

    def close(self) -> None:
        processes.stop(self._head, 2)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def ask(self, method: str, path: str, token: bool = True, **more: Any) -> httpx2.Response:
        header = {"Authorization": f"Bearer {(self._scratch / 'token').read_text()}"} if token else {}
        address = f"http://127.0.0.1:{self.dashboard}{path}"
        return httpx2.request(method, address, headers=header, timeout=LIMIT_S, trust_env=False, **more)

    def _listed(self, what: str) -> list[dict[str, Any]]:
        if not processes.accepts(self.dashboard):
            return []
        answer = self.ask("GET", f"/api/v0/{what}?detail=1&limit=1000")
        return answer.json()["data"]["result"]["result"] if answer.status_code == 200 else []

    def nodes(self) -> list[dict[str, Any]]:
        """Those that are alive."""
        return [node for node in self._listed("nodes") if node["state"] == "ALIVE"]

    def added(self) -> Counter[str]:
        """How many nodes of each group are alive, by their label."""
        return Counter(map(role, self.nodes())) - Counter({"head": 1})

    def ever(self) -> Counter[str]:
        """How many nodes of each group there have been."""
        return Counter(map(role, self._listed("nodes")))

    def placed(self, kind: str) -> Counter[str]:
        """How many actors of a class each group took; `nowhere` is for those that wait."""
        groups = {node["node_id"]: role(node) for node in self._listed("nodes")} | {None: "nowhere"}
        return Counter(groups[actor["node_id"]] for actor in self._listed("actors") if kind in actor["class_name"])

    def deploy(self, config: Mapping[str, Any]) -> None:
        """As `serve deploy` does."""
        answer = self.ask("PUT", "/api/serve/applications/", json=config)
        assert answer.status_code == 200, answer.text

    def undeploy(self) -> None:
        assert self.ask("DELETE", "/api/serve/applications/").status_code == 200

    def told(self) -> str:
        """What there is and what is wanted, for a test that failed."""
        return f"{self.added()}: {self.ask('GET', '/api/cluster_status').text}"

    def run(self, code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """A driver on the head."""
        command = [sys.executable, "-c", code, *arguments]
        variables = self._variables() | {"RAY_ADDRESS": f"127.0.0.1:{self.gcs}"}
        try:
            return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{error.stderr} {self.told()}") from None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Autoscaled]:
    made = Autoscaled(tmp_path_factory.mktemp("scaled"), yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))
    yield made
    made.close()
