from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kintsugi.errors import ModelNotFound, ObjectNotFound, StoreUnavailable
from kintsugi_serve.batches.batch import BatchRequest, Progress, make_batch
from kintsugi_serve.ingress.batch_routes import build_routes
from kintsugi_serve.ingress.callers import Caller
from kintsugi_serve.ingress.edge import Edge, Metrics, handle_errors
from kintsugi_serve.jobs import LoadedModel
from kintsugi_serve.schemas import Refusal, Settings

STORE = "s3://plant/kintsugi"
JOB = {"input": "s3://plant/raw/", "output": "s3://plant/clean/", "model": "unet@production"}
MODEL = LoadedModel("unet", 3, "d" * 64)


class Batches:
    """Notes every batch and never runs one. `failure` comes first."""

    def __init__(self) -> None:
        self.begun: dict[tuple[str, str], Progress] = {}
        self.failure: Exception | None = None

    def start(self, tenant: str, request: BatchRequest) -> Progress:
        if self.failure is not None:
            raise self.failure
        batch = make_batch(STORE, tenant, request.input, request.output, MODEL, request.white_level)
        facts = batch.model_dump(exclude={"tenant"}) | dict.fromkeys(("restored", "kept", "refused", "failed"), 0)
        progress = Progress(
            **facts, id=batch.id, status="running", round=0, total=None, remaining=None, ledger=None, alarms=0,
            detail=None,
        )  # fmt: skip
        return self.begun.setdefault((tenant, batch.id), progress)

    def progress(self, tenant: str, id: str) -> Progress:
        try:
            return self.begun[tenant, id]
        except KeyError:
            raise ObjectNotFound(f"there is no batch {id}") from None

    def list(self, tenant: str) -> list[Progress]:
        return [progress for (owner, _), progress in self.begun.items() if owner == tenant]


class Named:
    """What an edge with keys does: says whose request it is."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope["headers"]).get(b"x-tenant")
        if given:
            scope.setdefault("state", {})["caller"] = Caller(given.decode(), (given.decode(),))
        await self.app(scope, receive, send)


@pytest.fixture
def batches() -> Batches:
    return Batches()


@pytest.fixture
def checked() -> list[tuple[str, str, str]]:
    return []


@pytest.fixture
def client(batches: Batches, checked: list[tuple[str, str, str]]) -> TestClient:
    def check(kind: str) -> Any:
        def allow(uri: str, prefixes: tuple[str, ...]) -> None:
            checked.append((kind, uri, *prefixes))
            if not uri.startswith("s3://plant/"):
                raise Refusal("forbidden", "the address is outside the places that this service may use")

        return allow

    app = FastAPI()
    app.add_middleware(Named)
    app.add_middleware(Edge, settings=Settings(store=STORE), metrics=Metrics())
    handle_errors(app)
    app.include_router(build_routes(batches, check("read"), check("write")))
    return TestClient(app)


def test_a_batch_is_accepted_and_its_progress_is_at_its_location(client: TestClient) -> None:
    answer = client.post("/v1/batches", json=JOB)
    begun = answer.json()
    assert (answer.status_code, begun["status"], begun["model"]) == (202, "running", "unet@3")
    shown = client.get(answer.headers["location"])
    assert (shown.status_code, shown.json()) == (200, begun)
    assert client.get("/v1/batches").json() == [begun]


def test_the_same_request_is_answered_with_the_same_batch(client: TestClient, batches: Batches) -> None:
    first, second = (client.post("/v1/batches", json=JOB).json() for _ in range(2))
    assert first == second and len(batches.begun) == 1


def test_a_tenant_sees_its_own_batches_only(client: TestClient) -> None:
    first = client.post("/v1/batches", json=JOB, headers={"X-Tenant": "anna"}).json()
    path = f"/v1/batches/{first['id']}"
    assert client.get(path, headers={"X-Tenant": "anna"}).status_code == 200
    assert client.get(path, headers={"X-Tenant": "bert"}).json()["code"] == "not_found"
    assert client.get(path).status_code == 404
    assert client.get("/v1/batches").json() == []


def test_both_addresses_are_checked_for_the_tenant_before_anything_starts(
    client: TestClient, checked: list[tuple[str, str, str]], batches: Batches
) -> None:
    client.post("/v1/batches", json=JOB, headers={"X-Tenant": "anna"})
    assert checked == [("read", "s3://plant/raw", "anna"), ("write", "s3://plant/clean", "anna")]
    for part in ("input", "output"):
        for uri in ("s3://elsewhere/raw", "/etc", "file:///etc"):
            answer = client.post("/v1/batches", json={**JOB, part: uri})
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert len(batches.begun) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"input": "s3://plant/raw"},
        {**JOB, "masks": "s3://plant/masks"},
        {**JOB, "white_level": 0},
        {**JOB, "white_level": 70000},
        {**JOB, "model": ""},
        {**JOB, "output": "s3://plant/raw/clean"},
        {**JOB, "output": "s3://plant/kintsugi/models/unet"},
        [],
    ],
)
def test_a_request_that_cannot_work_is_malformed(client: TestClient, body: Any) -> None:
    answer = client.post("/v1/batches", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (ModelNotFound("there is no model"), 404, "not_found"),
        (ObjectNotFound("there is nothing under s3://plant/raw"), 404, "not_found"),
        (StoreUnavailable("no answer"), 503, "store_unavailable"),
        (RuntimeError("a fault of ours"), 500, "internal"),
    ],
)
def test_what_fails_is_a_problem(
    client: TestClient, batches: Batches, failure: Exception, status: int, code: str
) -> None:
    batches.failure = failure
    answer = client.post("/v1/batches", json=JOB)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_the_routes_are_in_the_description(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert sorted(paths["/v1/batches"]) == ["get", "post"] and list(paths["/v1/batches/{id}"]) == ["get"]
    assert "202" in paths["/v1/batches"]["post"]["responses"]
