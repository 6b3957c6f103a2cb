"""A Ray cluster of its own for a benchmark, on this machine, whose nodes and drivers can be killed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import train_trace
from ray._private.node import Node
from ray.cluster_utils import Cluster

from kintsugi.processes import free_ports

HERE = Path(__file__).parent
LIMIT_S = 900
"""Nothing that is waited for here takes this long, not even on a busy machine."""


@contextmanager
def ray_head(num_cpus: int) -> Iterator[Cluster]:
    """A head with a dashboard, without which Ray Train asks in vain for the state of its own actors all the time."""
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray's workers give way to all other processes, so that a busy machine makes minutes of every start.
    os.environ |= {"RAY_worker_niceness": "0"}
    head = {"num_cpus": num_cpus, "include_dashboard": True, "dashboard_port": free_ports(1)[0]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        # Asked politely, every node waits half a minute for work that nobody will do.
        for node in [*cluster.worker_nodes, cluster.head_node]:
            cluster.remove_node(node, allow_graceful=False)


@dataclass
class Farm:
    """A Ray cluster on this machine: a head that runs no worker, and two nodes with room for one worker each."""

    scratch: Path
    cluster: Cluster
    nodes: list[Node] = field(default_factory=list)

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def kill_node(self) -> None:
        """SIGKILL for the raylet and whatever runs on its node."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    @contextmanager
    def driver(
        self, store: str, run: str, config: Path, *more: str, script: str = "train_driver.py"
    ) -> "Iterator[subprocess.Popen[bytes]]":
        """Train or search `run` in a process of its own, in the background."""
        words = [sys.executable, str(HERE / script), self.cluster.address, store, run, str(config)]
        variables = {"KINTSUGI_TRACE": str(self.trace(run)), "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
        with (self.scratch / f"{run}.log").open("ab") as log:
            process = subprocess.Popen([*words, *more], env={**os.environ, **variables}, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def trace(self, run: str) -> Path:
        return self.scratch / f"{run}.trace"

    def lines(self, run: str, kind: str = "step") -> list[dict[str, Any]]:
        return [line for line in train_trace.read(self.trace(run)) if line["kind"] == kind]

    def log(self, run: str) -> str:
        return (self.scratch / f"{run}.log").read_text()[-3000:]


@contextmanager
def farm(scratch: Path) -> Iterator[Farm]:
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with ray_head(0) as cluster:
        made = Farm(scratch, cluster)
        made.add()
        made.add()
        yield made


def wait_until(reached: Callable[[], bool], what: str, told: Callable[[], str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {LIMIT_S} s in vain for {what}:\n{told()}")
        time.sleep(0.01)  # polls a file that other processes write


def finish(process: "subprocess.Popen[bytes]", told: Callable[[], str]) -> None:
    if process.wait(LIMIT_S):
        raise SystemExit(f"the driver failed:\n{told()}")
