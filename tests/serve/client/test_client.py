import base64
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from kintsugi import imaging
from kintsugi.errors import ConfigError, ImageError, KintsugiError, StoreError
from kintsugi.storage import MemoryStore
from kintsugi_serve.client import Client, RestoredImage, ServiceError
from kintsugi_serve.ingress.api import build_api
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

    return Client("http://service", transport=httpx2.MockTransport(answer), **{"max_wait_s": 0, **options})


def _image(**more: str) -> httpx2.Response:
    headers = {
        "X-Kintsugi-Model": "unet@3",
        "X-Kintsugi-Model-Digest": "d",
        "X-Kintsugi-Defect-Retention": "0.9000",
        "X-Kintsugi-Alarm": "true",
        "X-Request-Id": "r",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return httpx2.Response(200, content=b"restored", headers=headers)


def _report(**more: Any) -> httpx2.Response:
    document = {
        "image": base64.b64encode(b"restored").decode(),
        "format": "png",
        "model": "unet@3",
        "digest": "d",
        "report": {"retention": 0.9, "alarm": True, "reasons": ["faint"], "abstained": None},
        "request_id": "r",
        **more,
    }
    return httpx2.Response(200, json=document)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _problem(status: int = 503, code: str = "overloaded", **headers: str) -> httpx2.Response:
    problem = {**PROBLEM, "code": code}
    return httpx2.Response(status, json=problem, headers={"content-type": "application/problem+json", **headers})


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
    echo.failure = Refusal("mask_required", "give the mask too")
    with pytest.raises(ServiceError, match="give the mask too") as caught:
        client.restore(b"image")
    assert (caught.value.code, caught.value.status) == ("mask_required", 422)
    assert len(caught.value.request_id) == 36
    assert caught.value.request_id in str(caught.value) and caught.value.detail == "give the mask too"


def test_a_problem_is_a_kintsugi_error() -> None:
    assert issubclass(ServiceError, KintsugiError)


@pytest.mark.parametrize(
    "passing",
    [
        _problem(503),
        _problem(400, code="digest_mismatch"),
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


def test_retry_after_is_honoured_up_to_a_bound() -> None:
    waits: list[float] = []
    answers = [_problem(503, **{"retry-after": "3"}), _problem(503, **{"retry-after": "900"}), _image()]
    _client(answers, [], max_wait_s=10, sleep=waits.append).restore(b"image")
    assert 3 <= waits[0] <= 3.2
    assert waits[1] == 10


def test_a_key_is_sent_as_bearer() -> None:
    asked: list[httpx2.Request] = []
    _client([_image()], asked, api_key="k").restore(b"image")
    assert asked[0].headers["authorization"] == "Bearer k"


def test_another_server_is_not_taken_for_the_service() -> None:
    with pytest.raises(ServiceError, match="is this a kintsugi service"):
        _client([httpx2.Response(200, text="hello")], []).restore(b"image")


@pytest.mark.parametrize("key", ["k\u00e9", "a\nb"])
def test_a_key_that_no_header_carries_is_refused_at_once(key: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        Client("http://service", key)


@pytest.mark.parametrize("address", ["", "service:8000", "ftp://service", "http://", "http://host:port"])
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match="write it as http"):
        Client(address)


def test_a_password_in_the_address_stays_out_of_messages() -> None:
    client = Client("http://me:hush@service", retries=0, transport=httpx2.MockTransport(_refuse))
    with pytest.raises(ServiceError) as caught:
        client.models()
    assert "hush" not in str(caught.value) and "http://service" in str(caught.value)


def _refuse(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("refused")


def test_every_try_of_a_call_carries_its_one_key_and_the_digest_of_its_bytes() -> None:
    asked: list[httpx2.Request] = []
    client = _client([_problem(503), httpx2.ReadError("reset"), _image(), _image()], asked)
    client.restore(b"image", mask=b"mask")
    client.restore(b"image")
    keys = [request.headers["idempotency-key"] for request in asked]
    assert len(set(keys[:3])) == 1 and keys[3] != keys[0] and len(keys[0]) == 32
    for request in asked:
        digest = base64.b64encode(hashlib.sha256(request.read()).digest()).decode()
        assert request.headers["content-digest"] == f"sha-256=:{digest}:"
    assert len({request.read() for request in asked[:3]}) == 1


def test_only_what_is_asked_for_is_sent() -> None:
    asked: list[httpx2.Request] = []
    client = _client([_image()], asked)
    client.restore(b"image")
    client.restore(b"image", white_level=0, model="unet@staging", embed=True)
    assert asked[0].url.query == b""
    assert dict(asked[1].url.params) == {"white_level": "0", "model": "unet@staging", "embed": "true"}
    assert "x-kintsugi-timeout" not in asked[0].headers


def test_a_restored_image_carries_its_digests_and_times() -> None:
    timing = "decode;dur=1.2, queue;dur=0, model;dur=30.25"
    restored = _client([_image(Server_Timing=timing)], []).restore(b"image")
    assert (restored.input_sha256, restored.output_sha256) == (_sha256(b"image"), _sha256(b"restored"))
    assert restored.timing == {"decode": 1.2, "queue": 0.0, "model": 30.25}


@pytest.mark.parametrize(
    "damaged",
    [
        _image(X_Kintsugi_Output_SHA256="0" * 64),
        _image(X_Kintsugi_Input_SHA256="0" * 64),
        _report(output_sha256="0" * 64),
        _report(image="not base64!"),
        _report(defect_map=base64.b64encode(b"no image").decode()),
        httpx2.Response(200, content=b'{"image": "AA', headers={"content-type": "application/json"}),
    ],
)
def test_damaged_bytes_are_asked_for_again_and_never_handed_out(damaged: httpx2.Response) -> None:
    asked: list[httpx2.Request] = []
    with_report = "x-kintsugi-model" not in damaged.headers
    client = _client([damaged, _report() if with_report else _image()], asked)
    restored = client.restore_with_report(b"image") if with_report else client.restore(b"image")
    assert restored.data == b"restored" and len(asked) == 2
    client = _client([damaged], [], retries=1)
    with pytest.raises(ServiceError) as caught:
        client.restore_with_report(b"image") if with_report else client.restore(b"image")
    assert caught.value.code == "corrupted"


def test_digests_that_agree_pass() -> None:
    said = {"X_Kintsugi_Input_SHA256": _sha256(b"image"), "X_Kintsugi_Output_SHA256": _sha256(b"restored").upper()}
    assert _client([_image(**said)], []).restore(b"image").data == b"restored"


def test_a_report_comes_with_the_image_and_the_map() -> None:
    asked: list[httpx2.Request] = []
    levels = np.array([[0, 51, 255]], np.uint8)
    encoded = base64.b64encode(imaging.encode(imaging.Image(levels))).decode()
    client = _client([_report(defect_map=encoded, timing_ms={"model": 3.5}), _report(defect_map=None)], asked)
    restored = client.restore_with_report(b"image")
    assert restored.report is not None and restored.report["reasons"] == ["faint"]
    assert (restored.data, restored.retention, restored.alarm) == (b"restored", 0.9, True)
    assert restored.timing == {"model": 3.5}
    assert restored.defect_map is not None and restored.defect_map.dtype == np.float32
    assert np.allclose(restored.defect_map, [[0, 0.2, 1]])
    assert asked[0].headers["accept"] == "application/json" and asked[0].url.params["defect_map"] == "true"
    assert client.restore_with_report(b"image", defect_map=False).defect_map is None
    assert "defect_map" not in asked[1].url.params


def test_a_source_is_bytes_a_path_or_an_image(tmp_path: Path) -> None:
    asked: list[httpx2.Request] = []
    client = _client([_image()], asked)
    image = imaging.Image(np.full((4, 5), 900, np.uint16), "png", 1023)
    (tmp_path / "a.png").write_bytes(imaging.encode(image))
    client.restore(tmp_path / "a.png")
    client.restore(str(tmp_path / "a.png"))
    client.restore(image)
    assert {request.read() for request in asked} == {imaging.encode(image)}
    assert [request.url.params.get("white_level") for request in asked] == [None, None, "1023"]
    client.restore(imaging.Image(np.zeros((4, 5), np.uint8)), mask=np.ones((4, 5), np.bool_))
    assert imaging.encode_mask(np.ones((4, 5), np.bool_)) in asked[3].read()
    assert "white_level" not in asked[3].url.params


def test_a_file_that_is_not_there_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    asked: list[httpx2.Request] = []
    client = _client([_image()], asked)
    with pytest.raises(StoreError, match=r"none.png cannot be read .*: check the path"):
        client.restore(tmp_path / "none.png")
    with pytest.raises(StoreError, match=r"none.png cannot be read"):
        client.restore(b"image", mask=tmp_path / "none.png")
    assert asked == []


def _restored(data: bytes, white_level: int | None = None) -> RestoredImage:
    return RestoredImage(data, "unet@3", "d", 0.9, False, "r", "i", "o", white_level=white_level)


def test_a_restored_image_is_decoded_at_the_white_level_that_was_sent() -> None:
    data = imaging.encode(imaging.Image(np.full((4, 5), 900, np.uint16), "png", 1023))
    assert _restored(data, 1023).image().white_level == 1023
    with pytest.raises(ImageError):
        _restored(b"restored").image()


def test_a_saved_image_replaces_another_only_where_that_is_asked(tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    assert _restored(b"one").save(target) == target
    _restored(b"one").save(str(target))
    with pytest.raises(ConfigError, match="holds something else"):
        _restored(b"two").save(target)
    assert target.read_bytes() == b"one"
    _restored(b"two").save(target, overwrite=True)
    assert target.read_bytes() == b"two" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(StoreError, match="cannot be written"):
        _restored(b"two").save(tmp_path / "no" / "out.png")


@pytest.mark.parametrize("answer", [httpx2.Response(200, json=[1]), httpx2.Response(200, json={"image": 3})])
def test_another_json_is_not_taken_for_a_report(answer: httpx2.Response) -> None:
    with pytest.raises(ServiceError, match="is this a kintsugi service"):
        _client([answer], []).restore_with_report(b"image")


def test_a_problem_that_says_less_than_it_should_is_still_an_error() -> None:
    bare = httpx2.Response(422, json={"title": "t"}, headers={"content-type": "application/problem+json"})
    with pytest.raises(ServiceError, match="answered 422") as caught:
        _client([bare], []).restore(b"image")
    assert caught.value.code == "unknown"


def test_an_error_of_the_service_survives_its_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ServiceError("mask_required", 422, "give the mask", "r")))
    assert (error.code, error.status, error.detail, error.request_id) == ("mask_required", 422, "give the mask", "r")
    assert str(error) == "give the mask (request id r)"
