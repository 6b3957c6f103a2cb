"""The description that the service gives of itself holds, for questions good and bad that are made from it."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.schemas import OpenApiSchema

from kintsugi.storage import MemoryStore
from kintsugi_serve.ingress.api import build_api
from kintsugi_serve.schemas import Settings

ROUTES = (
    ("POST", "/v1/restore"),
    ("POST", "/v1/restore/s3"),
    ("GET", "/v1/models"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
)


@pytest.fixture
def described(echo: Any) -> OpenApiSchema:
    objects = MemoryStore()
    objects.put("in/a.png", b"image")
    app = build_api(Settings(store="s3://plant/kintsugi"), echo, open_root=lambda _: objects)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_the_answers_are_those_that_the_description_promises(described: Any, method: str, path: str) -> None:
    @given(case=described[path][method].as_strategy())
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def ask(case: Any) -> None:
        # A body that is made up does not have the digest that is made up, and keys come again with other bodies.
        for name in ("Content-Digest", "Idempotency-Key"):
            (case.headers or {}).pop(name, None)
        case.call_and_validate()

    ask()


def test_every_route_of_the_description_is_tried(described: Any) -> None:
    found = {(operation.ok().method.upper(), operation.ok().path) for operation in described.get_all_operations()}
    assert found == set(ROUTES)
