import asyncio
import base64
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from kintsugi import errors
from kintsugi_serve.access.keys import Key
from kintsugi_serve.ingress.api import build_api
from kintsugi_serve.ingress.edge import ERROR_CODES, Edge, Metrics, code_of, problem_of
from kintsugi_serve.schemas import PROBLEMS, Settings

KEY = "a key of the line"
HASH = hashlib.sha256(KEY.encode()).hexdigest()
SMALL = 2048


@pytest.fixture
def client(echo: Any) -> TestClient:
    return TestClient(build_api(Settings(store="/nowhere", max_body_bytes=SMALL), echo))


@pytest.fixture
def guarded(echo: Any) -> TestClient:
    return TestClient(
        build_api(
            Settings(store="/nowhere", keys=(Key(tenant="other", sha256="0" * 64), Key(tenant="line", sha256=HASH))),
            echo,
        )
    )


def _endless(chunks: int, seen: list[int]) -> Iterator[bytes]:
    for index in range(chunks):
        seen.append(index)
        yield bytes(512)


@pytest.mark.parametrize("given", ["a", "part-7_3.tiff", "A" * 64])
def test_a_short_harmless_request_id_is_kept(client: TestClient, given: str) -> None:
    assert client.get("/healthz", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "A" * 65, "a b", "a;b", "<script>", "a\tb", "é", "a/b"])
def test_any_other_request_id_is_replaced(client: TestClient, given: str) -> None:
    answer = client.get("/healthz", headers={"X-Request-Id": given.encode("utf-8")})
    assert len(answer.headers["x-request-id"]) == 36


def test_behind_a_proxy_that_echoes_the_id_it_is_not_sent_twice(echo: Any) -> None:
    client = TestClient(build_api(Settings(store="/nowhere"), echo, proxy_echoes_id=True))
    assert "x-request-id" not in client.get("/healthz", headers={"X-Request-Id": "a"}).headers
    assert len(client.get("/healthz", headers={"X-Request-Id": "a;b"}).headers["x-request-id"]) == 36


def test_a_body_that_says_it_is_too_long_is_refused_unread(client: TestClient, echo: Any) -> None:
    answer = client.post("/v1/restore", content=bytes(SMALL + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert not echo.jobs


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x"])
def test_a_body_without_length_is_cut_off_at_the_limit(client: TestClient, echo: Any, kind: str) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'

    def chunks() -> Iterator[bytes]:
        yield head
        yield from _endless(1000, [])

    answer = client.post("/v1/restore", content=chunks(), headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert not echo.jobs


def test_a_body_of_the_limit_itself_is_taken(client: TestClient) -> None:
    assert client.post("/v1/restore", content=bytes(SMALL)).status_code == 200
    assert client.post("/v1/restore", content=_endless(4, [])).status_code == 200


def test_a_json_body_has_a_limit_of_its_own(echo: Any) -> None:
    client = TestClient(build_api(Settings(store="s3://plant/k"), echo))
    stream = (b'{"input": "' + b"a" * 1024 for _ in range(100))
    answer = client.post("/v1/restore/s3", content=stream, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


@pytest.mark.parametrize("length", ["-1", "many", "1e3", "٣"])
def test_a_length_that_is_no_number_is_malformed(client: TestClient, length: str) -> None:
    headers = {"Content-Length": length.encode("utf-8")}
    assert client.post("/v1/restore", content=b"x", headers=headers).status_code == 400


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/v1/models", "/nowhere"])
def test_a_key_is_needed_where_keys_are_set(guarded: TestClient, path: str) -> None:
    answer = guarded.get(path)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert "Basic" in answer.headers["www-authenticate"]


def test_a_restore_without_a_key_reaches_no_replica(guarded: TestClient, echo: Any) -> None:
    for path in ("/v1/restore", "/v1/restore/s3", "/v1//restore", "/healthz/../v1/restore"):
        assert guarded.post(path, content=b"x").status_code == 401
    assert not echo.jobs


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_need_no_key(guarded: TestClient, path: str) -> None:
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"X-API-Key": KEY},
        {"Authorization": "Basic " + base64.b64encode(f"anyone:{KEY}".encode()).decode()},
    ],
)
def test_a_known_key_opens(guarded: TestClient, headers: dict[str, str]) -> None:
    assert guarded.post("/v1/restore", content=b"x", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {HASH}"},
        {"Authorization": f"Token {KEY}"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic " + base64.b64encode(KEY.encode()).decode()},
        {"Authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()},
        {"X-API-Key": ""},
        {"X-API-Key": KEY + "x"},
    ],
)
def test_any_other_key_does_not(guarded: TestClient, headers: dict[str, str]) -> None:
    assert guarded.post("/v1/restore", content=b"x", headers=headers).status_code == 401


def test_every_error_of_the_library_has_a_code() -> None:
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        error = kind("undecodable", "x") if kind is errors.ImageError else kind("x")
        assert code_of(error) in PROBLEMS, name
    assert set(ERROR_CODES.values()) <= PROBLEMS.keys()


def test_what_went_wrong_inside_goes_to_the_log_and_not_to_the_client(
    client: TestClient, echo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    echo.failure = RuntimeError("password of the database")
    answer = client.post("/v1/restore", content=b"x")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert answer.headers["content-type"] == "application/problem+json"
    assert "password" not in answer.text
    assert "password of the database" in caplog.text
    assert answer.json()["request_id"] in caplog.text


def test_a_client_error_of_the_library_is_told() -> None:
    answer = problem_of(errors.ModelNotFound("there is no model 'x'"), "id")
    assert answer.status_code == 404
    assert b"there is no model 'x'" in answer.body


def _audit(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "kintsugi.audit"]


def test_each_request_leaves_one_line_that_says_who_what_and_by_which_model(
    guarded: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="kintsugi.audit"):
        headers = {"X-API-Key": KEY, "X-Request-Id": "part-7"}
        guarded.post("/v1/restore?white_level=4095", content=b"xyz", headers=headers)
    (line,) = _audit(caplog)
    assert (line["request_id"], line["method"], line["route"], line["status"]) == ("part-7", "POST", "/v1/restore", 200)
    assert (line["received"], line["sent"]) == (3, 3)
    assert (line["model"], line["model_digest"]) == ("unet@3", "d" * 64)
    assert line["input_sha256"] == line["output_sha256"] == hashlib.sha256(b"xyz").hexdigest()
    assert (line["retention"], line["alarm"]) == (0.9876, False)
    assert KEY not in caplog.text and "4095" not in caplog.text


def test_a_refused_request_leaves_a_line_with_its_code(
    guarded: TestClient, client: TestClient, echo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="kintsugi.audit"):
        guarded.post("/v1/restore", content=b"xyz")
        client.get("/unknown")
        echo.failure = RuntimeError("a fault")
        client.post("/v1/restore", content=b"xyz")
    assert [(line["status"], line["code"]) for line in _audit(caplog)] == [
        (401, "unauthorized"),
        (404, "not_found"),
        (500, "internal"),
    ]


def test_a_client_shortens_the_time_and_never_lengthens_it(client: TestClient, echo: Any) -> None:
    for given in ("0.5", "1e9", "inf"):
        client.post("/v1/restore", content=b"xyz", headers={"X-Kintsugi-Timeout": given})
    client.post("/v1/restore", content=b"xyz")
    short, *others = [job.budget_s for job in echo.jobs]
    assert 0 < short <= 0.5
    assert all(1 < budget <= Settings(store="/x").timeout_s for budget in others)


@pytest.mark.parametrize("given", ["soon", "", "-1", "0", "nan"])
def test_a_time_that_is_none_is_malformed(client: TestClient, given: str) -> None:
    answer = client.post("/v1/restore", content=b"xyz", headers={"X-Kintsugi-Timeout": given})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


def test_a_body_that_does_not_arrive_is_not_waited_for(echo: Any) -> None:
    metrics = Metrics()
    edge = Edge(build_api(Settings(store="/x"), echo), Settings(store="/x", timeout_s=0.01), metrics, grace_s=0.01)
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/restore", "headers": [], "query_string": b""}
    asyncio.run(edge(scope, receive, send))
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["code"] == "timeout"
    assert any(name == b"retry-after" for name, _ in sent[0]["headers"])


def _metrics(client: TestClient) -> str:
    """Without the name of the process."""
    return re.sub(r',?process="\w+",?', "", client.get("/metrics").text).replace("{}", "")


def test_metrics_count_by_route_and_status(client: TestClient, echo: Any) -> None:
    echo.alarm = True
    client.post("/v1/restore", content=b"abc")
    client.post("/v1/restore", content=bytes(SMALL + 1))
    for index in range(3):
        client.get(f"/unknown/{index}")
    text = _metrics(client)
    assert 'kintsugi_requests_total{route="/v1/restore",status="200"} 1.0' in text
    assert 'kintsugi_requests_total{route="unmatched",status="404"} 3.0' in text
    assert 'status="413"} 1.0' in text
    assert 'kintsugi_received_bytes_total{route="/v1/restore"} 3.0' in text
    assert 'kintsugi_request_seconds_count{route="/v1/restore"} 1.0' in text
    assert 'kintsugi_alarms_total{model="unet@3"} 1.0' in text
    assert 'kintsugi_retention_count{model="unet@3"} 1.0' in text
    assert 'kintsugi_stage_seconds_count{stage="model"} 1.0' in text
    assert "kintsugi_batch_images_count 1.0" in text
    assert "kintsugi_ongoing_requests 1.0" in text
    client.get("/v1/models")
    text = _metrics(client)
    assert f'kintsugi_model_info{{digest="{"d" * 64}",model="unet@3"}} 1.0' in text
    assert "kintsugi_model_refused 0.0" in text


def test_answers_are_neither_sniffed_nor_kept(client: TestClient) -> None:
    answer = client.get("/healthz")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
