from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from kintsugi.errors import KintsugiError
from kintsugi.storage import MemoryStore
from kintsugi_serve.api import build_api
from kintsugi_serve.client import Client, ServiceError
from kintsugi_serve.jobs import Rejection
from kintsugi_serve.schemas import Refusal, Settings

Answering = Callable[[httpx2.Request], httpx2.Response]
PROBLEM = {"code": "overloaded", "detail": "later", "title": "t", "status": 503, "request_id": "r"}


def _client(answers: list[Any], asked: list[httpx2.Request], **options: Any) -> Client:
    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        found = answers[min(len(asked), len(answers)) - 1]
        if isinstance(found, Exception):
            raise found
        return found

    return Client("http://service", transport=httpx2.MockTransport(answer), max_wait_s=0, **options)


def _image() -> httpx2.Response:
    headers = {
        "X-Kintsugi-Model": "unet@3",
        "X-Kintsugi-Model-Digest": "d",
        "X-Kintsugi-Defect-Retention": "0.9000",
        "X-Kintsugi-Alarm": "true",
        "X-Request-Id": "r",
    }
    return httpx2.Response(200, content=b"restored", headers=headers)


def _problem(status: int = 503, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json=PROBLEM, headers={"content-type": "application/problem+json", **headers})


def _against(api: TestClient) -> Client:
    """A client whose requests reach the real application."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        found = api.request(request.method, str(request.url), content=request.read(), headers=dict(request.headers))
        return httpx2.Response(found.status_code, content=found.content, headers=dict(found.headers))

    return Client("http://testserver", transport=httpx2.MockTransport(answer), max_wait_s=0)


def test_a_restored_image_carries_what_the_service_said() -> None:
    restored = _client([_image()], []).restore(b"image")
    assert (restored.data, restored.model, restored.digest) == (b"restored", "unet@3", "d")
    assert (restored.retention, restored.alarm, restored.request_id) == (0.9, True, "r")


def test_client_and_service_agree(echo: Any) -> None:
    objects = MemoryStore()
    objects.put("in.png", b"image")
    client = _against(TestClient(build_api(Settings(store="s3://plant/k"), echo, open_root=lambda _: objects)))
    assert client.restore(b"image", mask=b"mask", white_level=1023).data == b"image"
    assert (echo.jobs[0].image, echo.jobs[0].mask, echo.jobs[0].white_level) == (b"image", b"mask", 1023)
    assert client.restore(b"alone").data == b"alone"
    assert echo.jobs[1].mask is None
    assert client.restore_s3("s3://plant/k/in.png", "s3://plant/k/out.png")["created"] is True
    assert client.ready()
    echo.rejection = Rejection("mask_required", "give the mask too")
    with pytest.raises(ServiceError, match="give the mask too") as caught:
        client.restore(b"image")
    assert (caught.value.code, caught.value.status) == ("mask_required", 422)
    assert len(caught.value.request_id) == 36
    echo.failure = Refusal("unavailable", "starting")
    echo.rejection = None


def test_a_problem_is_a_kintsugi_error() -> None:
    assert issubclass(ServiceError, KintsugiError)


@pytest.mark.parametrize(
    "passing",
    [
        _problem(503),
        _problem(429, **{"retry-after": "3"}),
        httpx2.Response(429, text="busy"),
        httpx2.Response(500, text="Internal Server Error"),
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("reset"),
    ],
)
def test_what_may_pass_is_tried_again(passing: Any) -> None:
    asked: list[httpx2.Request] = []
    assert _client([passing, passing, _image()], asked).restore(b"image", mask=b"m").data == b"restored"
    assert len(asked) == 3
    assert all(b"image" in request.read() for request in asked)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 415, 422, 500])
def test_what_will_not_pass_is_not_tried_again(status: int) -> None:
    asked: list[httpx2.Request] = []
    with pytest.raises(ServiceError) as caught:
        _client([_problem(status)], asked).restore(b"image")
    assert (caught.value.code, caught.value.status, len(asked)) == ("overloaded", status, 1)


def test_tries_are_bounded() -> None:
    asked: list[httpx2.Request] = []
    with pytest.raises(ServiceError) as caught:
        _client([_problem(503)], asked, retries=2).restore(b"image")
    assert (caught.value.code, len(asked)) == ("overloaded", 3)


def test_a_service_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(ServiceError, match="is the service running") as caught:
        _client([httpx2.ConnectError("refused")], [], retries=1).restore(b"image")
    assert (caught.value.code, caught.value.status) == ("unreachable", 0)
    assert not _client([httpx2.ConnectError("refused")], []).ready()


def test_retry_after_is_honoured_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("kintsugi_serve.client.time.sleep", waits.append)
    asked: list[httpx2.Request] = []
    client = _client([_problem(503, **{"retry-after": "3"}), _problem(503, **{"retry-after": "900"}), _image()], asked)
    client._max_wait_s = 10
    client.restore(b"image")
    assert 3 <= waits[0] <= 3.2
    assert waits[1] == 10


def test_a_key_is_sent_as_bearer() -> None:
    asked: list[httpx2.Request] = []
    _client([_image()], asked, api_key="k").restore(b"image")
    assert asked[0].headers["authorization"] == "Bearer k"


def test_another_server_is_not_taken_for_the_service() -> None:
    with pytest.raises(ServiceError, match="is this a kintsugi service"):
        _client([httpx2.Response(200, text="hello")], []).restore(b"image")
