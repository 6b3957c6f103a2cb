import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from kintsugi import imaging
from kintsugi.errors import StoreError, StoreUnavailable
from kintsugi.storage import LocalStore, MemoryStore
from kintsugi_serve.ingress.api import build_api
from kintsugi_serve.jobs import Rejection
from kintsugi_serve.replica.replica import Replica
from kintsugi_serve.schemas import Refusal, Settings

ROOT = "s3://plant/kintsugi"
PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'


@pytest.fixture
def objects() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def client(echo: Any, objects: MemoryStore) -> TestClient:
    return TestClient(build_api(Settings(store=ROOT), echo, open_root=lambda uri: objects))


def _problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    body = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), body
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["status"] == status
    assert body["title"] and body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


def _real(settings: Settings, one_by_one: Any) -> TestClient:
    replica = Replica(settings, batching=one_by_one)
    asyncio.run(replica.reconfigure({"model": "unet"}))
    return TestClient(build_api(settings, replica))


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((40, 48), np.uint8, "png"),
        ((40, 48), np.uint16, "png"),
        ((40, 48, 3), np.uint16, "png"),
        ((40, 48), np.uint16, "tiff"),
        ((40, 48, 3), np.uint8, "tiff"),
        ((40, 48), np.uint8, "jpeg"),
        ((40, 48), np.uint8, "bmp"),
    ],
)
def test_a_raw_image_comes_back_in_kind(
    settings: Settings,
    store: LocalStore,
    tmp_path: Any,
    publish: Any,
    picture: Any,
    one_by_one: Any,
    shape: Any,
    dtype: type,
    kind: imaging.Format,
) -> None:
    version = publish(store, tmp_path / "a")
    data = picture(shape, dtype, kind)
    answer = _real(settings, one_by_one).post("/v1/restore", content=data, headers={"Content-Type": f"image/{kind}"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"image/{kind}"
    image = imaging.decode(answer.content)
    assert (image.format, image.pixels.shape, image.pixels.dtype) == (kind, shape, dtype)
    assert answer.headers["x-kintsugi-model"] == "unet@1"
    assert answer.headers["x-kintsugi-model-digest"] == version.digest
    assert answer.headers["x-kintsugi-alarm"] in ("true", "false")
    assert 0 <= float(answer.headers["x-kintsugi-defect-retention"]) <= 1


def test_multipart_brings_image_and_mask(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, picture: Any, mask_file: Any, one_by_one: Any
) -> None:
    publish(store, tmp_path / "a", mask="given")
    client = _real(settings, one_by_one)
    data = picture((40, 48), np.uint16, "tiff")
    files = {"image": ("part.tiff", data), "mask": ("mask.png", mask_file())}
    answer = client.post("/v1/restore", files=files)
    assert answer.status_code == 200
    assert imaging.decode(answer.content).pixels.dtype == np.uint16
    _problem(client.post("/v1/restore", content=data), 422, "mask_required")
    wrong = {"image": ("part.tiff", data), "mask": ("mask.png", mask_file((10, 10)))}
    _problem(client.post("/v1/restore", files=wrong), 422, "mismatch")
    _problem(client.post("/v1/restore?white_level=300", content=data), 422, "over_white_level")


def test_json_carries_report_and_image(client: TestClient, picture: Any) -> None:
    answer = client.post("/v1/restore", content=picture(), headers={"Accept": "application/json"})
    body = answer.json()
    assert base64.b64decode(body["image"]) == picture()
    assert body["report"] == {"retention": 0.9876, "added": 0.01, "alarm": False}
    assert (body["model"], body["digest"], body["format"]) == ("unet@3", "d" * 64, "png")
    assert body["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["x-kintsugi-defect-retention"] == "0.9876"


@pytest.mark.parametrize("kind", ["image/png", "image/x-ms-bmp", "application/octet-stream", "IMAGE/TIFF; x=y", None])
def test_these_content_types_are_images(client: TestClient, echo: Any, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    assert client.post("/v1/restore?white_level=4095", content=b"bytes", headers=headers).status_code == 200
    assert (echo.jobs[-1].image, echo.jobs[-1].white_level) == (b"bytes", 4095)


def test_what_curl_sends_by_default_is_taken_as_an_image(client: TestClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/v1/restore", content=b"bytes", headers=headers).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/zip", "multipart/mixed; boundary=a"])
def test_other_content_types_are_refused(client: TestClient, kind: str) -> None:
    _problem(client.post("/v1/restore", content=b"x", headers={"Content-Type": kind}), 415, "unsupported_format")


def test_an_empty_body_is_malformed(client: TestClient) -> None:
    _problem(client.post("/v1/restore"), 400, "bad_request")


@pytest.mark.parametrize("query", ["white_level=bright", "white_level=1.5", "white_level="])
def test_a_bad_query_is_malformed(client: TestClient, query: str) -> None:
    assert "white_level" in _problem(client.post(f"/v1/restore?{query}", content=b"x"), 400, "bad_request")["detail"]


@pytest.mark.parametrize(
    "files",
    [
        {"mask": ("m.png", b"x")},
        {"picture": ("m.png", b"x")},
        [("image", ("a.png", b"x")), ("image", ("b.png", b"x"))],
        [("image", ("a.png", b"x")), ("mask", ("b.png", b"x")), ("mask", ("c.png", b"x"))],
        {"image": (None, b"x")},
        {"image": ("a.png", b"x"), "mask": (None, b"x")},
    ],
)
def test_other_parts_than_one_image_and_a_mask_are_malformed(client: TestClient, files: Any) -> None:
    _problem(client.post("/v1/restore", files=files), 400, "bad_request")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--x\r\n\r\n"),
        ("multipart/form-data; boundary=x", b"this is no multipart"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc',
        ),
        ("multipart/form-data; boundary=x", b""),
    ],
)
def test_broken_multipart_is_malformed(client: TestClient, kind: str, body: bytes) -> None:
    _problem(client.post("/v1/restore", content=body, headers={"Content-Type": kind}), 400, "bad_request")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("unsupported_format", 415),
        ("unsupported_mode", 415),
        ("too_large", 413),
        ("undecodable", 422),
        ("over_white_level", 422),
        ("mismatch", 422),
        ("mask_required", 422),
        ("internal", 500),
    ],
)
def test_a_rejection_is_answered_with_its_code(client: TestClient, echo: Any, code: str, status: int) -> None:
    echo.rejection = Rejection(code, "because")
    assert _problem(client.post("/v1/restore", content=b"x"), status, code)["detail"] == "because"


@pytest.mark.parametrize("code", ["overloaded", "unavailable", "timeout"])
def test_no_free_replica_is_503_with_retry_after(client: TestClient, echo: Any, code: str) -> None:
    echo.failure = Refusal(code, "later")
    answer = client.post("/v1/restore", content=b"x")
    _problem(answer, 503, code)
    assert int(answer.headers["retry-after"]) >= 1


def test_unknown_paths_and_methods_are_problems_too(client: TestClient) -> None:
    _problem(client.get("/v2/restore"), 404, "not_found")
    answer = client.get("/v1/restore")
    _problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def _s3(client: TestClient, **job: Any) -> Any:
    return client.post("/v1/restore/s3", json={"input": f"{ROOT}/in/a.png", "output": f"{ROOT}/out/a.png", **job})


def test_s3_reads_restores_and_writes(client: TestClient, echo: Any, objects: MemoryStore) -> None:
    objects.put("in/a.png", b"image")
    objects.put("in/m.png", b"mask")
    answer = _s3(client, mask=f"{ROOT}/in/m.png", white_level=1023)
    assert answer.status_code == 200
    assert answer.json()["created"] is True
    assert answer.headers["x-kintsugi-model"] == "unet@3"
    assert objects.get("out/a.png") == b"image"
    assert (echo.jobs[0].image, echo.jobs[0].mask, echo.jobs[0].white_level) == (b"image", b"mask", 1023)


def test_s3_again_is_success_and_writes_nothing(client: TestClient, objects: MemoryStore) -> None:
    objects.put("in/a.png", b"image")
    assert _s3(client).json()["created"] is True
    assert _s3(client).json()["created"] is False


def test_s3_never_overwrites_another_object(client: TestClient, objects: MemoryStore) -> None:
    objects.put("in/a.png", b"image")
    objects.put("out/a.png", b"the only copy")
    _problem(_s3(client), 409, "conflict")
    assert objects.get("out/a.png") == b"the only copy"


def test_s3_says_which_object_is_missing(client: TestClient, echo: Any, objects: MemoryStore) -> None:
    objects.put("in/a.png.bak", b"image")
    assert f"{ROOT}/in/a.png" in _problem(_s3(client), 404, "not_found")["detail"]
    assert not echo.jobs


@pytest.mark.parametrize("field", ["input", "mask", "output"])
@pytest.mark.parametrize("uri", ["s3://plant/kintsugi-evil/a", f"{ROOT}/../a", "s3://other/a", "file:///etc/passwd"])
def test_s3_stays_below_its_roots(client: TestClient, echo: Any, objects: MemoryStore, field: str, uri: str) -> None:
    objects.put("in/a.png", b"image")
    _problem(_s3(client, **{field: uri}), 403, "forbidden")
    assert not echo.jobs


@pytest.mark.parametrize("folder", ["models", "datasets", "runs"])
def test_s3_writes_nothing_among_models_datasets_and_runs(
    client: TestClient, objects: MemoryStore, folder: str
) -> None:
    objects.put("in/a.png", b"image")
    _problem(_s3(client, output=f"{ROOT}/{folder}/a.png"), 403, "forbidden")
    assert [info.key for info in objects.list()] == ["in/a.png"]


def test_s3_without_roots_reaches_nothing(echo: Any, tmp_path: Any) -> None:
    client = TestClient(build_api(Settings(store=str(tmp_path)), echo))
    _problem(_s3(client), 403, "forbidden")


def test_s3_objects_that_are_too_large_are_not_read(echo: Any, objects: MemoryStore) -> None:
    settings = Settings(store=ROOT, max_body_bytes=1024, max_streamed_pixels=0)
    client = TestClient(build_api(settings, echo, open_root=lambda _: objects))
    objects.put("in/a.png", bytes(1025))
    _problem(_s3(client), 413, "too_large")
    assert echo.large == []


def test_s3_objects_that_are_too_large_to_be_held_are_left_to_a_replica(echo: Any, objects: MemoryStore) -> None:
    class Unread(MemoryStore):
        def get_with_etag(self, key: str) -> tuple[bytes, str]:
            raise AssertionError(f"{key} was read")

    store = Unread({"in/a.png": bytes(1025)})
    client = TestClient(build_api(Settings(store=ROOT, max_body_bytes=1024), echo, open_root=lambda _: store))
    _problem(_s3(client), 413, "too_large")
    [job] = echo.large
    assert (job.tenant, job.image.uri, job.target.uri) == ("local", f"{ROOT}/in/a.png", f"{ROOT}/out/a.png")
    assert 0 < job.budget_s <= 60


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"input": 3, "output": "x"}', b'{"input": "x", "output": "y", "more": 1}']
)
def test_s3_with_a_bad_body_is_malformed(client: TestClient, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    _problem(client.post("/v1/restore/s3", content=body, headers=headers), 400, "bad_request")


def test_s3_needs_json_so_that_no_foreign_web_page_can_ask(client: TestClient, objects: MemoryStore) -> None:
    objects.put("in/a.png", b"image")
    body = json.dumps({"input": f"{ROOT}/in/a.png", "output": f"{ROOT}/out/a.png"})
    answer = client.post("/v1/restore/s3", content=body, headers={"Content-Type": "text/plain"})
    _problem(answer, 400, "bad_request")
    assert not objects.exists("out/a.png")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (StoreUnavailable("10.0.0.7 is down"), 503, "store_unavailable"),
        (StoreError("10.0.0.7 says no"), 502, "store_failed"),
    ],
)
def test_a_failing_store_is_a_problem_that_names_no_insides(
    echo: Any, error: Exception, status: int, code: str
) -> None:
    class Broken(MemoryStore):
        def size(self, key: str) -> int:
            raise error

    client = TestClient(build_api(Settings(store=ROOT), echo, open_root=lambda _: Broken()))
    answer = _s3(client)
    assert "10.0.0.7" not in _problem(answer, status, code)["detail"]
    assert ("retry-after" in answer.headers) == (status == 503)


def test_models_names_what_is_served_and_what_is_published(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, one_by_one: Any
) -> None:
    first = publish(store, tmp_path / "a")
    client = _real(settings, one_by_one)
    body = client.get("/v1/models").json()
    assert body["serving"] == {"name": "unet", "version": 1, "digest": first.digest}
    assert [(model["name"], len(model["versions"])) for model in body["published"]] == [("unet", 1)]


def test_alive_does_not_need_a_replica_but_ready_does(client: TestClient, echo: Any) -> None:
    echo.failure = Refusal("unavailable", "starting")
    assert client.get("/healthz").json() == {"status": "alive", "service": "kintsugi"}
    answer = client.get("/readyz")
    _problem(answer, 503, "unavailable")
    assert "retry-after" in answer.headers


def test_a_replica_that_answered_just_now_is_ready_though_too_busy_to_say_so(client: TestClient, echo: Any) -> None:
    assert client.post("/v1/restore", content=b"x").status_code == 200
    echo.failure = Refusal("overloaded", "busy")
    assert client.get("/readyz").json()["model"] == "unet@3"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_pages_load_nothing_from_elsewhere(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe-inline" not in answer.headers["content-security-policy"]
    assert " style=" not in answer.text and " onclick=" not in answer.text
    for text in ("http://", "https://", "<link", "@import", "<script src"):
        assert text not in answer.text


def test_openapi_lists_the_routes(client: TestClient) -> None:
    routes = {"/v1/restore", "/v1/restore/s3", "/v1/models", "/healthz", "/readyz", "/metrics"}
    assert client.get("/openapi.json").json()["paths"].keys() == routes


def test_a_file_object_of_a_client_library_works(client: TestClient, picture: Any) -> None:
    answer = client.post("/v1/restore", files={"image": io.BytesIO(picture())})
    assert answer.content == picture()
