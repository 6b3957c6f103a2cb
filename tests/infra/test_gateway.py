"""What the gateway lets in, and what it does when something behind it fails; with the real nginx on loopback."""

import ast
import hashlib
import json
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray.serve

from kintsugi.processes import free_ports, wait_until
from kintsugi_serve.schemas import Settings

TEMPLATE = (Path(__file__).parents[2] / "infra/gateway/nginx.conf.template").read_text()
PASSED = frozenset(name.lower() for name in re.findall(r"proxy_set_header (\S+)", TEMPLATE))
BY_NGINX = frozenset({"connection", "content-length"})
LIMIT_S = 30.0


# What comes in


@pytest.mark.parametrize("path", ["/v1/restore", "/v1/restore/s3"])
@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
def test_a_body_over_the_cap_is_refused_and_never_reaches_the_service(
    gateway: Any, upstream: Any, path: str, chunked: bool, check_problem: Any
) -> None:
    behind = upstream()
    front = gateway(behind, max_body="100k")
    body = bytes(100 * 1024 + 1)
    check_problem(front.post(path, iter([body[:70_000], body[70_000:]]) if chunked else body), 413, "too_large")
    assert behind.received == []


def test_a_body_of_just_the_cap_arrives_whole(gateway: Any, upstream: Any) -> None:
    behind = upstream()
    body = os.urandom(100 * 1024)
    assert gateway(behind, max_body="100k").post(content=iter([body[:1000], body[1000:]])).status_code == 200
    assert behind.received[0].body == body


def test_the_shipped_cap_is_the_services(gateways: ModuleType) -> None:
    assert gateways.shipped_settings()["GATEWAY_MAX_BODY"] == f"{Settings(store='s3://b').max_body_bytes // 2**20}m"


def test_headers_that_ray_obeys_do_not_reach_it(gateway: Any, upstream: Any) -> None:
    behind = upstream()
    hostile = ("x-request-timeout-seconds", "x-request-disconnect-disabled", "x-session-id", "x-serve-router-target")
    hostile += ("serve-multiplexed-model-id", "serve_multiplexed_model_id", "x_session_id", "traceparent", "tracestate")
    kept = ("Accept", "Authorization", "X-API-Key", "Content-Type", "Content-Digest", "Idempotency-Key")
    headers = dict.fromkeys(hostile, "0") | dict.fromkeys((*kept, "X-Kintsugi-Timeout"), "kept")
    headers["X-Forwarded-For"] = "10.1.2.3"
    assert gateway(behind).post(headers=headers).status_code == 200
    assert behind.received[0].headers.keys() <= PASSED | BY_NGINX
    assert behind.received[0].headers["x-forwarded-for"] == "127.0.0.1"
    assert {name for name, value in behind.received[0].headers.items() if value == "kept"} == {
        *(name.lower() for name in kept),
        "x-kintsugi-timeout",
    }


def test_no_header_that_passes_is_one_that_ray_serve_names() -> None:
    named: set[str] = set()
    for source in Path(ray.serve.__file__).parent.rglob("*.py"):
        if {"tests", "benchmarks"}.isdisjoint(source.parts):
            constants = (
                node.value for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Constant)
            )
            named |= {value.lower().replace("_", "-") for value in constants if isinstance(value, str)}
    assert {"x-request-timeout-seconds", "x-session-id", "serve-multiplexed-model-id", "traceparent"} <= named
    # The request id is checked, "host" is a setting of Ray's, and the content type only says what the body is.
    assert named & PASSED == {"x-request-id", "host", "content-type"}


@pytest.mark.parametrize(
    ("given", "is_kept"), [("Line-3_7.a", True), ("a" * 64, True), ("a" * 65, False), ('a"b', False), ("a b", False)]
)
def test_a_harmless_request_id_is_kept_and_another_one_replaced(
    gateway: Any, upstream: Any, reply: Any, logged: Any, given: str, is_kept: bool
) -> None:
    behind = upstream(reply(more=(("X-Request-Id", "of-the-proxy"),)))
    response = gateway(behind).post(headers={"X-Request-Id": given})
    used = response.headers.get_list("x-request-id")
    assert used == [given] if is_kept else re.fullmatch("[0-9a-f]{32}", used[0])
    assert behind.received[0].headers["x-request-id"] == used[0]
    assert wait_until(lambda: [line["request_id"] for line in logged()] == used, LIMIT_S)


def test_a_request_without_an_id_gets_one_of_its_own(gateway: Any, upstream: Any) -> None:
    front = gateway(upstream())
    assert len({front.get("/v1/models").headers["x-request-id"] for _ in range(5)}) == 5


@pytest.mark.parametrize(
    "path", ["/-/routes", "/-/healthz", "/v1/../-/routes", "/v1/%2e%2e/-/routes", "/api/jobs/", "/v2"]
)
def test_only_the_services_own_paths_are_known(gateway: Any, upstream: Any, path: str) -> None:
    behind = upstream()
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = gateway(behind).exchange(request.encode())
    assert answer.startswith(b"HTTP/1.1 404") and json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "not_found"
    assert behind.received == []


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics", "/v1/batches/b-1?x=1"]
)
def test_the_services_paths_arrive_as_they_are(gateway: Any, upstream: Any, path: str) -> None:
    behind = upstream()
    assert gateway(behind).get(path).status_code == 200
    assert behind.received[0].target == path


def test_the_service_sees_the_path_that_was_matched(gateway: Any, upstream: Any) -> None:
    behind = upstream()
    request = b"GET /-/../v1//x/%2e%2e/models?a=%2e HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert gateway(behind).exchange(request).startswith(b"HTTP/1.1 200")
    assert behind.received[0].target == "/v1/models?a=%2e"


def test_metrics_are_for_named_addresses_only(gateway: Any, upstream: Any, check_problem: Any) -> None:
    behind = upstream()
    front = gateway(behind, metrics_from="allow 10.1.2.3;", trusted_proxies="set_real_ip_from 127.0.0.1;")
    for path in ("/metrics", "//metrics", "/v1/..%2fmetrics"):
        check_problem(front.get(path), 403, "forbidden")
    assert behind.received == []
    assert front.get("/metrics", headers={"X-Forwarded-For": "10.1.2.3"}).status_code == 200


def test_an_address_that_only_a_client_claims_counts_for_nothing(
    gateway: Any, upstream: Any, check_problem: Any
) -> None:
    front = gateway(upstream(), metrics_from="allow 10.1.2.3;")
    check_problem(front.get("/metrics", headers={"X-Forwarded-For": "10.1.2.3"}), 403, "forbidden")


# What fails behind it


def test_a_request_whose_upstream_dies_is_sent_whole_to_another(
    gateway: Any, upstream: Any, reply: Any, logged: Any
) -> None:
    dying, other = upstream(reply(status=None)), upstream()
    front = gateway(dying, other)
    bodies = [os.urandom(3_000_000) for _ in range(4)]
    assert [front.post(content=body).content for body in bodies] == [b"restored"] * 4
    assert len(dying.received) >= 1
    assert [one.body for one in other.received] == bodies
    assert wait_until(lambda: any(line["upstream_status"] == "502, 200" for line in logged()), LIMIT_S)


@pytest.mark.parametrize("path", ["/v1/restore", "/v1/restore/s3", "/v1/batches"])
def test_a_500_is_tried_again_on_another_upstream(gateway: Any, upstream: Any, reply: Any, path: str) -> None:
    failing, other = upstream(reply(500, b"Internal Server Error", "text/plain")), upstream()
    front = gateway(failing, other)
    assert {front.post(path).status_code for _ in range(3)} == {200}
    assert failing.received


def test_a_single_proxy_whose_replica_died_is_asked_again(gateway: Any, upstream: Any, reply: Any) -> None:
    replies = iter([reply(500, b"Internal Server Error", "text/plain"), reply(status=None), reply()])
    behind = upstream(lambda _: next(replies))
    assert gateway(behind).post().status_code == 200
    assert len(behind.received) == 3


def test_when_nothing_answers_it_is_tried_a_bounded_number_of_times(
    gateway: Any, upstream: Any, reply: Any, logged: Any, check_problem: Any
) -> None:
    dying, dead = upstream(reply(status=None)), f"127.0.0.1:{free_ports(1)[0]}"
    front = gateway(dying, dead, dying, dead, dying, dead, tries=4)
    check_problem(front.post(), 503, "unavailable")
    assert wait_until(lambda: [line["upstream_status"] for line in logged()] == ["502, 502, 502, 502"], LIMIT_S)
    assert len(dying.received) == 2


def test_a_failure_that_stays_is_answered_by_the_service_itself(gateway: Any, upstream: Any, reply: Any) -> None:
    problem = b'{"code": "internal", "status": 500}'
    behind = upstream(reply(500, problem, "application/problem+json"))
    response = gateway(behind).post()
    assert (response.status_code, response.content, len(behind.received)) == (500, problem, 3)


@pytest.mark.parametrize("status", [400, 404, 408, 413, 422, 429, 502, 503])
def test_a_refusal_of_the_service_is_passed_on_unchanged_and_not_sent_again(
    gateway: Any, upstream: Any, reply: Any, status: int
) -> None:
    problem = json.dumps({"code": "mine", "status": status}).encode()
    behind = upstream(reply(status, problem, "application/problem+json", (("Retry-After", "7"),)))
    response = gateway(behind).post()
    assert (response.status_code, response.content, response.headers.get_list("retry-after")) == (
        status,
        problem,
        ["7"],
    )
    assert len(behind.received) == 1


def test_an_answer_that_never_comes_ends_as_a_timeout(gateway: Any, check_problem: Any) -> None:
    # A listening socket that nobody accepts from: connected, then silence.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        front = gateway(f"127.0.0.1:{silent.getsockname()[1]}", answer_timeout="200ms", retry_within="100ms")
        check_problem(front.post(), 503, "timeout")


def test_an_answer_of_30_mb_passes_unchanged(gateway: Any, upstream: Any, reply: Any) -> None:
    large = os.urandom(30_000_000)
    assert gateway(upstream(reply(body=large))).post().content == large


def test_many_at_once_get_each_their_own_answer(gateway: Any, upstream: Any, reply: Any) -> None:
    behind = upstream(lambda request: reply(body=hashlib.sha256(request.body).hexdigest().encode()))
    front = gateway(behind)
    bodies = [os.urandom(200_000) for _ in range(96)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda body: front.post(content=body).text, bodies))
    assert answers == [hashlib.sha256(body).hexdigest() for body in bodies]
