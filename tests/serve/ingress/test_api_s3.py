"""S3 to S3 over HTTP: one result a question, within the caller's own prefixes."""

import hashlib
from typing import Any

import pytest
from fastapi.testclient import TestClient

from kintsugi.storage import MemoryStore
from kintsugi_serve.access.keys import Key, sha256_of
from kintsugi_serve.ingress.api import build_api
from kintsugi_serve.schemas import Settings

ROOT = "s3://plant/kintsugi"
KEYS = (
    Key(tenant="line-1", sha256=sha256_of("one"), prefixes=("s3://plant/line-1/",), requests_per_minute=12),
    Key(tenant="line-2", sha256=sha256_of("two"), prefixes=("s3://plant/line-2",)),
)


class Buckets:
    """One store for every root."""

    def __init__(self) -> None:
        self.stores: dict[str, MemoryStore] = {}

    def open(self, uri: str) -> MemoryStore:
        return self.stores.setdefault(uri.rstrip("/"), MemoryStore())

    def results(self) -> list[str]:
        return [info.key for info in self.open(ROOT).list("results/") if not info.key.endswith(".json")]


@pytest.fixture
def buckets() -> Buckets:
    return Buckets()


@pytest.fixture
def local(echo: Any, buckets: Buckets) -> TestClient:
    buckets.open(ROOT).put("in/a.png", b"image")
    buckets.open(ROOT).put("in/b.png", b"image")
    return TestClient(build_api(Settings(store=ROOT), echo, open_root=buckets.open))


@pytest.fixture
def lines(echo: Any, buckets: Buckets) -> TestClient:
    for line in (1, 2):
        buckets.open(f"s3://plant/line-{line}").put("in/a.png", b"image")
    return TestClient(build_api(Settings(store=ROOT, keys=KEYS), echo, open_root=buckets.open))


def _ask(client: TestClient, key: str = "", **job: Any) -> Any:
    return client.post("/v1/restore/s3", json=job, headers={"X-API-Key": key} if key else {})


def test_a_question_is_worked_on_once_and_answered_alike_ever_after(
    local: TestClient, echo: Any, buckets: Buckets
) -> None:
    first = _ask(local, input=f"{ROOT}/in/a.png", output=f"{ROOT}/out/1.png")
    again = _ask(local, input=f"{ROOT}/in/b.png", output=f"{ROOT}/out/2.png")
    assert first.status_code == again.status_code == 200
    assert len(echo.jobs) == 1
    assert len(buckets.results()) == 1
    assert first.json()["result"] == again.json()["result"] == f"{buckets.open(ROOT).uri}/{buckets.results()[0]}"
    assert first.json()["report"] == again.json()["report"]
    same = ("x-kintsugi-model", "x-kintsugi-defect-retention", "x-kintsugi-alarm", "x-kintsugi-output-sha256")
    assert [first.headers[name] for name in same] == [again.headers[name] for name in same]
    assert buckets.open(ROOT).get("out/2.png") == b"image"


def test_another_white_level_mask_or_model_is_another_question(local: TestClient, echo: Any, buckets: Buckets) -> None:
    buckets.open(ROOT).put("in/m.png", b"mask")
    asked = [{}, {"white_level": 4095}, {"mask": f"{ROOT}/in/m.png"}, {"model": "other"}]
    results = [_ask(local, input=f"{ROOT}/in/a.png", **more).json()["result"] for more in asked]
    # The fake answers with one model whatever is asked for, so that the last is kept where the first is.
    assert len(echo.jobs) == 4
    assert len(set(results)) == 3


def test_without_an_output_the_result_stays_where_results_are_kept(local: TestClient, buckets: Buckets) -> None:
    answer = _ask(local, input=f"{ROOT}/in/a.png").json()
    taken = hashlib.sha256(b"image").hexdigest()
    assert answer["output"] == answer["result"]
    assert f"/results/local/{taken}/{'d' * 64}/" in answer["result"]
    assert (answer["created"], answer["input_sha256"], answer["output_sha256"]) == (True, taken, taken)
    assert _ask(local, input=f"{ROOT}/in/a.png").json()["created"] is False


def test_a_result_that_was_damaged_is_not_given(local: TestClient, buckets: Buckets) -> None:
    _ask(local, input=f"{ROOT}/in/a.png")
    buckets.open(ROOT).put(buckets.results()[0], b"imagf")
    answer = _ask(local, input=f"{ROOT}/in/a.png")
    assert (answer.status_code, answer.json()["code"]) == (502, "store_failed")


def test_a_tenant_reaches_its_own_prefixes_only(lines: TestClient, echo: Any) -> None:
    own = {"input": "s3://plant/line-2/in/a.png", "output": "s3://plant/line-2/out/a.png"}
    assert _ask(lines, "two", **own).status_code == 200
    for foreign in ({"input": "s3://plant/line-1/in/a.png"}, {**own, "output": "s3://plant/line-1/out/a.png"},
                    {"input": f"{ROOT}/models/unet/versions/1/weights.safetensors"}):  # fmt: skip
        answer = _ask(lines, "two", **foreign)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert len(echo.jobs) == 1


def test_tenants_do_not_share_results(lines: TestClient, echo: Any) -> None:
    found = [
        _ask(lines, key, input=f"s3://plant/line-{number}/in/a.png").json()["result"]
        for number, key in ((1, "one"), (2, "two"))
    ]
    assert [result.split("/results/")[1].split("/")[0] for result in found] == ["line-1", "line-2"]
    assert len(echo.jobs) == 2


def test_a_tenant_that_asks_too_often_is_told_when_to_come_again(lines: TestClient) -> None:
    answers = [_ask(lines, "one", input="s3://plant/line-1/in/a.png") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert answers[3].json()["code"] == "rate_limited"
    assert int(answers[3].headers["retry-after"]) >= 1
    assert _ask(lines, "two", input="s3://plant/line-2/in/a.png").status_code == 200


def test_a_service_without_keys_answers_its_own_machine_only(echo: Any) -> None:
    app = build_api(Settings(store=ROOT), echo, open_root=lambda _: MemoryStore())
    for address, status in (("127.0.0.1", 200), ("::1", 200), ("192.0.2.7", 403)):
        client = TestClient(app, client=(address, 5000))
        assert client.post("/v1/restore", content=b"x").status_code == status
        assert client.get("/healthz").status_code == 200
