"""probe.py HOST:PORT...: what each port tells one who has no secret, as JSON: {"HOST:PORT": [answers]}.

A port that takes no connection is left out; one that takes it and tells nothing has an empty list.
"""

import json
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from kintsugi import doors

PATHS = (
    "/",
    "/metrics",
    "/api/version",
    "/api/jobs/",
    "/nodes?view=summary",
    "/logs/",
    "/api/job_agent/jobs/",
    "/-/routes",
)
CALLS = (
    *("ray.rpc.NodeInfoGcsService/GetAllNodeInfo", "ray.rpc.NodeManagerService/GetNodeStats"),
    *("ray.rpc.ObjectManagerService/Pull", "ray.rpc.CoreWorkerService/GetCoreWorkerStats"),
    *("ray.rpc.ReporterService/GetTraceback", "ray.rpc.RayletDriver/Terminate", "ray.serve.ASGIService/HandleRequest"),
)
LIMIT_S = 3.0
REFUSED = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


def told(address: str) -> list[str] | None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=LIMIT_S).close()
    except OSError:
        return None
    return [*_by_http(address), *_by_grpc(address)]


def _by_http(address: str) -> Iterator[str]:
    answers = {path: doors.ask(f"http://{address}{path}", timeout_s=LIMIT_S) for path in PATHS}
    if all(answer and answer.body.startswith(b"# HELP") for answer in answers.values()):
        yield "metrics"
        return
    for path, answer in answers.items():
        if answer and answer.status < 400:
            yield f"GET {path}"


def _by_grpc(address: str) -> Iterator[str]:
    """A method that a server does not have is no answer: another of them is what it has."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        for call in CALLS:
            try:
                channel.unary_unary(f"/{call}")(b"", timeout=LIMIT_S)
            except grpc.RpcError as error:
                if error.code() not in REFUSED:
                    yield f"{call}: {error.code().name}"
            else:
                yield f"{call}: OK"


if __name__ == "__main__":
    with ThreadPoolExecutor(16) as pool:
        answers = dict(zip(sys.argv[1:], pool.map(told, sys.argv[1:]), strict=True))
    print(json.dumps({address: found for address, found in answers.items() if found is not None}))
