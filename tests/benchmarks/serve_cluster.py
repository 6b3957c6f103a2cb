"""The service on a Ray cluster of its own, on this machine, for benchmarks and for those who kill its processes.

    with ray_serve(num_cpus=2) as cluster, serving(cluster, args) as service:
        run_load(Load(service.address, bodies, connections=8))
        service.processes("Replica")        # to measure, or to kill

Variables for all of Ray's processes (RAY_SERVE_...) are set before the cluster starts; `raised` does that for a while.
"""

import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import skimage.data
import torch
from ray import serve
from ray.cluster_utils import Cluster
from train_cluster import HERE, wait_until

from kintsugi import imaging
from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import ExperimentConfig, load_config
from kintsugi.models import build_model
from kintsugi.processes import free_ports
from kintsugi.registry import ModelVersion, Registry
from kintsugi.storage import LocalStore
from kintsugi_serve.app import bind
from kintsugi_serve.replica.replica import Replica
from kintsugi_serve.schemas import Args

ROOT = HERE.parents[1]
APP = "bench"
DIRECT_PORTS = range(30000, 31001)
TITLES = {
    "Replica": f"ray::ServeReplica:{APP}:Replica",
    "Ingress": f"ray::ServeReplica:{APP}:Ingress",
    "Proxy": "ray::ProxyActor",
    "Controller": "ray::ServeController",
}


@contextmanager
def raised(variables: dict[str, str]) -> Iterator[None]:
    """`variables` in this process's environment, and in that of what it starts, for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def ray_serve(num_cpus: int) -> Iterator[Cluster]:
    """A head with `num_cpus` to give away, whatever the machine has, and Ray Serve's proxy on a free port.

    Nothing of it outlives the context, not even its folder under /tmp.
    """
    folder = Path(tempfile.mkdtemp(prefix="kb-", dir="/tmp"))  # Ray's socket paths must stay below 107 bytes
    paths = os.pathsep.join([str(HERE), *(path for path in sys.path if path)])
    quiet = {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_TMPDIR": str(folder),  # also keeps the note of the newest cluster's address, which others read, as it is
        "PYTHONPATH": paths,
    }
    with raised(quiet):
        head = {"num_cpus": num_cpus, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster
        finally:
            if ray.is_initialized():
                ray.shutdown()
            # Asked politely, every node waits half a minute for work that nobody will do.
            for node in [*cluster.worker_nodes, cluster.head_node]:
                cluster.remove_node(node, allow_graceful=False)
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Service:
    """An application that answers at `address` (HOST:PORT)."""

    address: str
    cluster: Cluster

    def processes(self, part: str) -> list[psutil.Process]:
        """Those of Replica, Ingress, Proxy or Controller, the oldest first."""
        raylets = [
            info.process.pid
            for node in [self.cluster.head_node, *self.cluster.worker_nodes]
            for info in node.all_processes["raylet"]
        ]
        children = (child for pid in raylets for child in psutil.Process(pid).children(recursive=True))
        found = [child for child in children if _title(child).startswith(TITLES[part])]
        return sorted(found, key=lambda process: process.create_time())

    def direct(self) -> str | None:
        """Where the ingress itself listens, past Ray's proxy; only with RAY_SERVE_ENABLE_DIRECT_INGRESS=1."""
        for process in self.processes("Ingress"):
            for socket in process.net_connections("tcp4"):
                if socket.status == psutil.CONN_LISTEN and socket.laddr.port in DIRECT_PORTS:
                    return f"127.0.0.1:{socket.laddr.port}"
        return None

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/readyz", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def serving(
    cluster: Cluster, args: Args, replica_class: type[Replica] = Replica, options: dict[str, Any] | None = None
) -> Iterator[Service]:
    """The application as `kintsugi serve` runs it, until the context ends; `options` are for Ray Serve's proxy."""
    if not ray.is_initialized():
        ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    port = free_ports(1)[0]
    http: dict[str, Any] = {"host": "127.0.0.1", "port": port, "request_timeout_s": args.timeout_s + 30}
    serve.start(proxy_location="HeadOnly", http_options=http | (options or {}))
    try:
        serve.run(bind(args, replica_class), name=APP, route_prefix="/", blocking=False)
    except RuntimeError as error:
        raise SystemExit(f"{error}\n{serve.status().applications}") from error
    service = Service(f"127.0.0.1:{port}", cluster)
    wait_until(service.ready, "a replica that is ready", lambda: str(serve.status().applications))
    try:
        yield service
    finally:
        serve.shutdown()


# ------------------------------------------------------------- what is served and sent


def publish_model(store: LocalStore, scratch: Path, config: ExperimentConfig | None = None) -> ModelVersion:
    """A model with random weights, as unet@production; by default of the architecture of `configs/demo.yaml`."""
    torch.manual_seed(0)
    config = config or load_config(ROOT / "platform/configs/demo.yaml")
    save_checkpoint(scratch / "checkpoint", build_model(config.model).eval(), config, {}, {})
    registry = Registry(store)
    version = registry.publish("unet", scratch / "checkpoint", b"{}")
    registry.promote(version.ref, "production")
    return version


def write_images(folder: Path, side: int, count: int = 8) -> tuple[str, ...]:
    """Files of grey 8-bit PNGs of `side` x `side` px: pieces of photographs of surfaces, with noise."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    photographs = [skimage.data.brick(), skimage.data.gravel(), skimage.data.grass()]
    files = [folder / f"{number}.png" for number in range(count)]
    for number, file in enumerate(files):
        photograph = photographs[number % 3]
        top, left = random.integers(0, photograph.shape[0] - side + 1, 2)
        pixels = photograph[top : top + side, left : left + side] + random.normal(0, 4, (side, side))
        file.write_bytes(imaging.encode(imaging.Image(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))))
    return tuple(map(str, files))
