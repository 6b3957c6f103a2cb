import re
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from kintsugi.errors import StoreUnavailable
from kintsugi.storage import LocalStore
from kintsugi_serve.ingress.api import build_api
from kintsugi_serve.ingress.exposition import torn_publishes
from kintsugi_serve.jobs import RefusedModel, Serving
from kintsugi_serve.schemas import PROBLEMS, Settings


@pytest.fixture
def client(echo: Any, settings: Settings) -> TestClient:
    return TestClient(build_api(settings, echo), client=("127.0.0.1", 1))


def _value(client: TestClient, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    (value,) = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
    return value


def test_what_alerts_count_is_there_as_zero_before_the_first_request(client: TestClient) -> None:
    for code in ("internal", "timeout", "overloaded", "unavailable", "store_unavailable", "store_failed"):
        assert _value(client, "kintsugi_problems_total", route="/v1/restore", code=code) == 0
    assert _value(client, "kintsugi_requests_total", route="/v1/restore/s3", status="200") == 0
    assert _value(client, "kintsugi_alarms_total", model="unet@3") == 0
    assert _value(client, "kintsugi_retention_count", model="unet@3") == 0
    assert _value(client, "kintsugi_torn_publishes") == 0


def test_every_code_of_a_failed_service_is_counted_from_zero(client: TestClient) -> None:
    text = client.get("/metrics").text
    counted = set(re.findall(r'kintsugi_problems_total{code="(\w+)"', text))
    assert counted == {code for code, (status, _) in PROBLEMS.items() if status >= 500}


def test_a_problem_is_counted_by_its_code(client: TestClient, echo: Any) -> None:
    echo.failure = StoreUnavailable("away")
    assert client.post("/v1/restore", content=b"abc").status_code == 503
    assert _value(client, "kintsugi_problems_total", route="/v1/restore", code="store_unavailable") == 1


def test_a_scrape_asks_a_replica_for_the_model_that_it_refuses(client: TestClient, echo: Any) -> None:
    assert _value(client, "kintsugi_model_refused") == 0
    refused = RefusedModel("unet@production", "damaged", "2026-01-01")

    async def describe() -> Serving:
        return Serving(await echo.resolve(None), refused)

    echo.describe = describe
    assert _value(client, "kintsugi_model_refused") == 1


def test_a_scrape_answers_where_neither_replica_nor_store_does(echo: Any, settings: Settings) -> None:
    def refuse(uri: str) -> LocalStore:
        raise StoreUnavailable(f"{uri} is away")

    echo.failure = StoreUnavailable("away")
    client = TestClient(build_api(settings, echo, open_root=refuse), client=("127.0.0.1", 1))
    assert _value(client, "kintsugi_torn_publishes") == 0


def test_two_processes_behind_one_address_have_series_of_their_own(echo: Any, settings: Settings) -> None:
    clients = [TestClient(build_api(settings, echo), client=("127.0.0.1", 1)) for _ in range(2)]
    first, second = (set(re.findall(r'process="(\w+)"', client.get("/metrics").text)) for client in clients)
    assert len(first) == len(second) == 1 and first != second


def test_a_version_without_its_manifest_is_torn(store: LocalStore) -> None:
    assert torn_publishes(store) == 0
    for key in ("versions/1/manifest.json", "versions/1/weights.safetensors", "versions/2/weights.safetensors"):
        store.put(f"models/unet/{key}", b"x")
    store.put("models/unet/aliases/production.json", b"{}")
    assert torn_publishes(store) == 1
