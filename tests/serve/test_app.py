import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

from kintsugi import doors
from kintsugi.errors import ConfigError, ModelNotFound, StoreError, StoreUnavailable
from kintsugi.registry import Registry
from kintsugi.storage import LocalStore, S3Store
from kintsugi_serve import app
from kintsugi_serve.access.addresses import S3Address
from kintsugi_serve.app import MESSAGE_BYTES, NODES, ReplicaBackend, build
from kintsugi_serve.jobs import Job, LargeAnswer, LargeJob, LoadedModel, Serving
from kintsugi_serve.schemas import Args, Refusal

CONFIG = Path(__file__).parents[2] / "serve" / "application.yaml"


class FakeResponse:
    def __init__(self, result: Any) -> None:
        self.result = result
        self.cancelled = False

    def __await__(self) -> Any:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        if self.result is None:
            await asyncio.Event().wait()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    """A handle whose methods answer with one response."""

    def __init__(self, result: Any) -> None:
        self.response = FakeResponse(result)
        self.restore = self.describe = self

    def options(self, **_: Any) -> "FakeHandle":
        return self

    def remote(self, *_: Any) -> FakeResponse:
        return self.response


def _refusal(result: Any) -> tuple[Refusal, FakeHandle]:
    handle: Any = FakeHandle(result)
    with pytest.raises(Refusal) as caught:
        asyncio.run(ReplicaBackend(handle, 1).restore(Job(b"x", budget_s=0.01)))
    return caught.value, handle


def _deployments(application: serve.Application) -> dict[str, Any]:
    found: dict[str, Any] = {}
    waiting = [application]
    while waiting:
        deployment = waiting.pop()._bound_deployment
        found[deployment.name] = deployment
        waiting += [argument for argument in deployment.init_args if isinstance(argument, serve.Application)]
    return found


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BackPressureError(num_queued_requests=9, max_queued_requests=8), "overloaded"),
        (ActorDiedError(), "unavailable"),
        (None, "timeout"),
    ],
)
def test_what_ray_raises_is_a_503_with_retry_after(error: Exception | None, code: str) -> None:
    refusal, _ = _refusal(error)
    assert (refusal.code, refusal.status) == (code, 503)
    assert refusal.retry_after_s


def test_work_that_nobody_waits_for_is_cancelled() -> None:
    _, handle = _refusal(None)
    assert handle.response.cancelled


def test_an_answer_of_a_replica_is_handed_on() -> None:
    serving = Serving(LoadedModel("unet", 1, "d"))
    handle: Any = FakeHandle(serving)
    assert asyncio.run(ReplicaBackend(handle, 1).describe()) == serving


def test_replicas_follow_the_alias_themselves(store: LocalStore, tmp_path: Path, publish: Any) -> None:
    publish(store, tmp_path / "a")
    Registry(store).promote("unet@1", "production")
    replica = _deployments(build(Args(store=str(store.root))))["Replica"]
    assert replica.user_config == {"model": "unet@production"}


def test_work_whose_replica_died_is_done_by_another_one() -> None:
    answers = [ActorDiedError(), ActorDiedError(), Serving(LoadedModel("unet", 1, "d"))]
    tried: list[Job] = []

    class Dying:
        def options(self, **_: Any) -> "Dying":
            return self

        def remote(self, job: Job) -> FakeResponse:
            tried.append(job)
            return FakeResponse(answers[len(tried) - 1])

    handle: Any = Dying()
    assert asyncio.run(ReplicaBackend(handle, 1).restore(Job(b"x"))) is answers[-1]
    assert len(tried) == 3
    assert tried[2].budget_s <= tried[0].budget_s <= Job(b"x").budget_s


def test_a_large_image_whose_replica_died_is_restored_by_another_one() -> None:
    answers = [ActorDiedError(), LargeAnswer("s3://plant/kintsugi/results/x", {}, created=True)]
    asked: list[dict[str, Any]] = []

    class Dying:
        def options(self, **options: Any) -> "Dying":
            asked.append(options)
            return self

        def remote(self, job: LargeJob) -> FakeResponse:
            return FakeResponse(answers.pop(0))

    handle: Any = Dying()
    job = LargeJob("local", S3Address("s3://plant", "a.tif"), model="unet@2")
    assert isinstance(asyncio.run(ReplicaBackend(handle, 1).restore_large(job)), LargeAnswer)
    assert {"method_name": "restore_large"} in asked and {"multiplexed_model_id": "unet@2"} in asked


@pytest.mark.parametrize(
    ("size", "died", "ways"), [(MESSAGE_BYTES, 0, [False]), (MESSAGE_BYTES + 1, 0, [True]), (9, 1, [False, True])]
)
def test_a_small_image_travels_in_a_message_and_after_a_failure_by_the_store(
    size: int, died: int, ways: list[bool]
) -> None:
    lost = AioRpcError(StatusCode.RESOURCE_EXHAUSTED, Metadata(), Metadata())
    answers = [*[lost] * died, Serving(LoadedModel("unet", 1, "d"))]
    seen: list[bool] = []

    class Way:
        def __init__(self, by_reference: bool) -> None:
            self._by_reference = by_reference

        def options(self, *, method_name: str, _by_reference: bool = True) -> "Way":
            return Way(_by_reference)

        def remote(self, job: Job) -> FakeResponse:
            seen.append(self._by_reference)
            return FakeResponse(answers[len(seen) - 1])

    handle: Any = Way(True)
    assert asyncio.run(ReplicaBackend(handle, 1).restore(Job(b"x" * size))) is answers[-1]
    assert seen == ways


def test_the_bounds_reach_ray(store: LocalStore, tmp_path: Path, publish: Any) -> None:
    publish(store, tmp_path / "a")
    args = Args(
        store=str(store.root), model="unet", min_replicas=2, max_replicas=3, num_cpus=0.25, max_queued_requests=5
    )
    found = _deployments(build(args))
    replica, ingress = found["Replica"], found["Ingress"]
    scaling = replica._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 3)
    assert replica.ray_actor_options["num_cpus"] == 0.25
    assert replica.max_queued_requests == 5
    assert replica.max_ongoing_requests == args.max_ongoing_requests
    assert ingress.ray_actor_options["num_cpus"] == 0.1
    assert replica.ray_actor_options["label_selector"] == ingress.ray_actor_options["label_selector"] == NODES


def test_ingress_and_replicas_fit_on_two_cores() -> None:
    args = Args(store="/nowhere")
    assert args.ingress_num_cpus + args.max_replicas * args.num_cpus < 2


def test_a_model_that_does_not_exist_stops_the_build(store: LocalStore) -> None:
    with pytest.raises(ModelNotFound):
        build(Args(store=str(store.root), model="unet@production"))


def test_a_store_that_is_spoken_to_in_the_clear_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store.plant:8333")
    with pytest.raises(ConfigError, match=r"http://store\.plant:8333 is plain HTTP"):
        build(Args(store="s3://plant/in-the-clear"))


def test_a_store_that_lets_a_second_writer_win_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overwriting(S3Store):
        def put(
            self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
        ) -> None:
            pass

        def delete(self, key: str) -> None:
            pass

    monkeypatch.setattr(doors, "open_store", Overwriting)
    with pytest.raises(StoreError, match="cannot hold models and datasets"):
        build(Args(store="s3://plant/overwriting"))


def test_a_store_that_does_not_answer_now_stops_no_build(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Away(S3Store):
        def put(
            self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
        ) -> None:
            raise StoreUnavailable("no answer")

        def delete(self, key: str) -> None:
            raise StoreUnavailable("no answer")

    # Its own: libraries that tests load before reconfigure the loggers that there are.
    logger = logging.Logger("app")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(app, "logger", logger)
    monkeypatch.setattr(doors, "open_store", Away)
    replica = _deployments(build(Args(store="s3://plant/away")))["Replica"]
    assert replica.user_config == {"model": "unet@production"}
    assert "neither the store nor unet@production could be checked" in caplog.text


def test_the_config_file_is_one_that_serve_deploys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINTSUGI_STORE", "s3://plant/kintsugi")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (application,) = schema.applications
    assert application.import_path == "kintsugi_serve.app:build"
    args = Args.model_validate(application.args)
    assert args.model == "unet@production"
    assert schema.http_options.host == "127.0.0.1"
    assert (schema.http_options.request_timeout_s or 0) > args.timeout_s


def test_the_config_file_says_the_defaults() -> None:
    given = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]
    assert Args.model_validate({"store": "/nowhere", **given}).model_dump() == Args(store="/nowhere").model_dump()
