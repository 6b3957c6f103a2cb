import asyncio
import base64
import hashlib
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.datastructures import Headers

from kintsugi.storage import MemoryStore
from kintsugi_serve.ingress.api import build_api
from kintsugi_serve.ingress.requests import Repeats
from kintsugi_serve.jobs import Job
from kintsugi_serve.schemas import Refusal, Settings

SENT = b"an image"


@pytest.fixture
def client(echo: Any) -> TestClient:
    return TestClient(build_api(Settings(store="s3://plant/k"), echo, open_root=lambda uri: MemoryStore()))


def _digest(data: bytes) -> dict[str, str]:
    return {"Content-Digest": f"sha-512=:AAAA:, sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"}


def test_a_body_that_is_not_what_its_digest_says_is_refused(client: TestClient, echo: Any) -> None:
    assert client.post("/v1/restore", content=SENT, headers=_digest(SENT)).status_code == 200
    answer = client.post("/v1/restore", content=SENT[:-1], headers=_digest(SENT))
    assert (answer.status_code, answer.json()["code"]) == (400, "digest_mismatch")
    assert len(echo.jobs) == 1


def test_the_answer_says_the_hashes_and_the_time_of_its_parts(client: TestClient) -> None:
    answer = client.post("/v1/restore", content=SENT)
    assert answer.headers["x-kintsugi-input-sha256"] == hashlib.sha256(SENT).hexdigest()
    assert answer.headers["x-kintsugi-output-sha256"] == hashlib.sha256(answer.content).hexdigest()
    assert answer.headers["server-timing"] == "model;dur=1.5"


def test_a_json_answer_holds_the_same_and_the_defect_map_if_asked(client: TestClient) -> None:
    accept = {"Accept": "application/json"}
    plain = client.post("/v1/restore", content=SENT, headers=accept).json()
    assert plain["output_sha256"] == hashlib.sha256(base64.b64decode(plain["image"])).hexdigest()
    assert plain["input_sha256"] == hashlib.sha256(SENT).hexdigest()
    assert (plain["timing_ms"], plain["defect_map"]) == ({"model": 1.5}, None)
    mapped = client.post("/v1/restore?defect_map=true", content=SENT, headers=accept).json()
    assert base64.b64decode(mapped["defect_map"]) == b"map"


def test_what_the_query_asks_reaches_the_replica(client: TestClient, echo: Any) -> None:
    client.post("/v1/restore?model=unet@2&white_level=4095&embed=true", content=SENT)
    (job,) = echo.jobs
    assert (job.model, job.white_level, job.embed, job.defect_map) == ("unet@2", 4095, True, False)


def test_a_key_comes_with_one_request_only(client: TestClient, echo: Any) -> None:
    key = {"Idempotency-Key": "part-7"}
    assert [client.post("/v1/restore", content=SENT, headers=key).status_code for _ in range(2)] == [200, 200]
    answer = client.post("/v1/restore", content=b"another", headers=key)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")
    answer = client.post("/v1/restore?white_level=9", content=SENT, headers=key)
    assert answer.json()["code"] == "idempotency_mismatch"
    assert client.post("/v1/restore", content=b"x", headers={"Idempotency-Key": "a b"}).status_code == 400


def test_tenants_do_not_share_keys_and_old_ones_are_forgotten() -> None:
    async def check() -> None:
        repeats = Repeats(size=2)
        headers = Headers({"Idempotency-Key": "k"})
        await repeats.check("a", headers, Job(b"1"))
        await repeats.check("b", headers, Job(b"2"))
        with pytest.raises(Refusal):
            await repeats.check("b", headers, Job(b"1"))
        await repeats.check("c", headers, Job(b"3"))
        await repeats.check("a", headers, Job(b"4"))

    asyncio.run(check())
