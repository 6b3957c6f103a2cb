"""The real Prometheus beside a stack, what the dashboards and rules ask it, and what ports tell without a secret."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import pytest
import yaml

from kintsugi import doors
from kintsugi.processes import free_ports

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "infra/monitoring"
EVERY_S = 2
NEEDS_GPU = {"kintsugi:training_gpu:percent", "ray_node_gram_used", "ray_node_gpus_utilization"}
BEGINS_WITH_A_FAILURE = {"ray_serve_health_check_failures_total", "ray_node_failure_total"}
"""Of these, tests/infra compares the names with Ray's source; the queries that hold the latter have data, zero."""
SOON_S = 90.0
METRIC = re.compile(r"\b(?:ray|kintsugi)_\w+(?=[{[ )]|$)")


class Prometheus:
    """As infra/monitoring/start runs it; `None` is answered where it is not to be had.

    Ray's gauges end with the process that set them: every question is about the whole time since the start.
    """

    def __init__(self, home: Path, folder: Path) -> None:
        (port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{port}"
        self._started = time.time()
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KINTSUGI_"))}
        settings = {
            "KINTSUGI_HOME": str(home),
            "MONITORING_FOLDER": str(folder),
            "MONITORING_LISTEN": f"127.0.0.1:{port}",
            "MONITORING_INTERVAL": f"{EVERY_S}s",
        }
        self._log = (folder.parent / "prometheus.log").open("w")
        self._process = subprocess.Popen([str(MONITORING / "start")], env={**ours, **settings}, stderr=self._log)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series of a query since the start that hold a number."""
        asked = {"query": query, "start": self._started, "end": time.time(), "step": EVERY_S}
        answer = httpx.post(f"{self.address}/api/v1/query_range", data=asked, timeout=30).json()
        assert answer["status"] == "success", f"{query}: {answer}"
        return [
            series
            for series in answer["data"]["result"]
            if any(value not in ("NaN", "+Inf", "-Inf") for _, value in series["values"])
        ]

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.address}/api/v1/{path}", timeout=30).json()["data"]

    def unanswered(self, queries: dict[str, str]) -> dict[str, str]:
        """Those of `queries` that have no data yet `SOON_S` from now."""
        deadline = time.monotonic() + SOON_S
        while missing := {name: query for name, query in queries.items() if not self.ask(query)}:
            assert self._process.poll() is None, "Prometheus stopped"
            if time.monotonic() > deadline:
                return missing
            queries = missing
            time.sleep(1)  # polls Prometheus
        return {}


@pytest.fixture(scope="session")
def monitor() -> Iterator[Callable[[Path, Path], Prometheus | None]]:
    """Starts Prometheus beside the stack of a home."""
    with ExitStack() as stack:

        def start(home: Path, folder: Path) -> Prometheus | None:
            places = f"{os.environ['PATH']}:{ROOT / '.kintsugi/debian/usr/bin'}"
            if shutil.which("prometheus", path=places) is None:
                return None
            prometheus = Prometheus(home, folder)
            stack.callback(prometheus.close)
            return prometheus

        yield start


@pytest.fixture(scope="session")
def monitored() -> dict[str, str]:
    """Every query of every dashboard and rule, every recorded series and every metric, but for `NEEDS_GPU`."""
    found: dict[str, str] = {}
    for path in sorted((MONITORING / "grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                query = re.sub(r"\$\w+", ".*", target["expr"])
                found[f"{path.stem}: {panel['title']}, {target['refId']}"] = query
    for path in sorted((MONITORING / "prometheus/rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                # An alert is silent unless it fires: asked for is what it compares.
                compared = re.findall(r"kintsugi:[\w:]+", rule["expr"]) if "alert" in rule else [rule["record"]]
                found |= {f"{rule.get('alert', 'series')}: {name}": name for name in compared}
                found |= {} if "alert" in rule else {f"rule: {rule['record']}": rule["expr"]}
    metrics = {name for query in found.values() for name in METRIC.findall(query)} - BEGINS_WITH_A_FAILURE
    found |= {f"metric: {name}": name for name in metrics}
    return {name: query for name, query in found.items() if not any(absent in query for absent in NEEDS_GPU)}


class Unlocked:
    """What a port of this machine answers to those who have no secret."""

    ray_calls = (
        *("NodeInfoGcsService/GetAllNodeInfo", "RayletDriver/Terminate", "ReporterService/GetTraceback"),
        *("NodeManagerService/GetNodeStats", "ObjectManagerService/Pull"),
    )
    """Of the GCS, the Ray client's server, the agent, and the raylet's two ports."""

    def paths(self, port: int) -> list[str]:
        """Those that answer HTTP."""
        paths = ("/", "/api/jobs/", "/api/version", "/nodes?view=summary", "/logs/", "/metrics", "/api/job_agent/jobs/")
        paths += ("/dir/assign", "/dir/status", "/col/delete?collection=kintsugi", "/kintsugi", "/buckets/kintsugi/")
        answers = {path: doors.ask(f"http://127.0.0.1:{port}{path}") for path in paths}
        harmless = (b"# HELP", b"<!doctype html>", b"<!DOCTYPE html>")
        return [path for path, a in answers.items() if a and a.status < 400 and not a.body.startswith(harmless)]

    def calls(self, port: int) -> dict[str, grpc.StatusCode]:
        """How each call by gRPC is answered."""
        calls = [f"ray.rpc.{call}" for call in self.ray_calls]
        calls += ["master_pb.Seaweed/ListMasterClients", "filer_pb.SeaweedFiler/GetFilerConfiguration"]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            return {call.removeprefix("ray.rpc."): _called(channel, call) for call in calls}


def _called(channel: grpc.Channel, call: str) -> grpc.StatusCode:
    try:
        channel.unary_unary(f"/{call}")(b"", timeout=10)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.fixture(scope="session")
def unlocked() -> Unlocked:
    return Unlocked()
