"""Restoring blocks without Ray, then rounds and services on a real Ray of two cores."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kintsugi import local
from kintsugi.errors import ConfigError, KintsugiError, ModelNotFound, ObjectNotFound, RunInterrupted, StackError
from kintsugi.imaging import decode, encode
from kintsugi.registry import ModelVersion, Registry
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import LocalStore
from kintsugi_serve.batches import commands
from kintsugi_serve.batches.batch import Batch, BatchRequest, Counts, Progress, make_batch
from kintsugi_serve.batches.records import Records
from kintsugi_serve.batches.run import RunOptions, load_published, run_batch
from kintsugi_serve.batches.service import RayBatchService, resolve_here
from kintsugi_serve.jobs import LoadedModel

IMAGES = 12


@pytest.fixture(scope="module")
def ray_of_two_cores() -> Iterator[None]:
    import ray

    # The paths of Ray's sockets must stay short.
    folder = tempfile.mkdtemp(prefix="kb-", dir="/tmp")
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            num_cpus=2, include_dashboard=False, _temp_dir=folder, object_store_memory=80 * 2**20, log_to_driver=False
        )
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def inputs(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """Eleven images and a text file."""
    folder = tmp_path / "raw"
    (folder / "b").mkdir(parents=True)
    for number in range(IMAGES - 1):
        (folder / ("b" if number % 2 else ".") / f"{number:02d}.png").write_bytes(picture((32 + number, 40)))
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def version(store: LocalStore, publish: Callable[..., ModelVersion], tmp_path: Path) -> ModelVersion:
    return publish(store, tmp_path / "checkpoint")


@pytest.fixture
def service(store: LocalStore) -> RayBatchService:
    return RayBatchService(store.uri, model="unet@1", options=RunOptions(concurrency=1), resolve=resolve_here)


def _ended(service: RayBatchService, id: str) -> Progress:
    """The batch when nothing works at it any more."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        progress = service.progress("local", id)
        if progress.status != "running":
            return progress
        time.sleep(0.1)
    raise AssertionError(f"batch {id} still runs")


def _ledger(store: LocalStore, id: str) -> list[dict[str, Any]]:
    body = store.get(f"batches/local/{id}/1/ledger.jsonl")
    return [json.loads(line) for line in body.splitlines()]


def _results(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def _expected(store: LocalStore, version: ModelVersion, folder: Path) -> dict[str, bytes]:
    restorer = Restorer.from_checkpoint(Registry(store).fetch(version))
    return {name: encode(restorer.restore(decode(data)).image) for name, data in _results(folder).items()}


@pytest.mark.timeout(600)  # processes start slowly on a busy machine
def test_every_image_has_one_line_though_an_actor_was_killed(
    ray_of_two_cores: None, store: LocalStore, version: ModelVersion, inputs: Path, tmp_path: Path
) -> None:
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    batch = make_batch(store.uri, "local", str(inputs), str(clean), LoadedModel("unet", 1, version.digest))

    def load(store_uri: str, batch: Batch, options: RunOptions) -> Any:
        model = load_published(store_uri, batch, options)

        class Mortal:
            def restore(self, image: object) -> object:
                if image.size[0] == 37 and not killed.exists():  # type: ignore[attr-defined]
                    killed.touch()
                    os._exit(1)
                return model.restore(image)  # type: ignore[arg-type]

        return Mortal()

    records = Records(store, batch)
    plan = records.next_plan()
    assert plan is not None and plan.total == IMAGES
    counted: list[Counts] = []
    done = run_batch(records, plan, store.uri, RunOptions(2), load=load, progress=counted.append)
    assert killed.exists()
    assert (done.totals.restored, done.totals.refused, done.totals.total) == (IMAGES - 1, 1, IMAGES)
    assert sum(counted, Counts()) == done.totals
    lines = _ledger(store, batch.id)
    assert [line["key"] for line in lines] == sorted(info.key for info in LocalStore(inputs).list())
    assert [line["code"] for line in lines if line["status"] == "refused"] == ["unsupported_format"]
    assert _results(clean) == _expected(store, version, inputs)


@pytest.mark.timeout(600)
def test_a_batch_that_stopped_says_why_and_goes_on_when_it_is_asked_to_though_its_runner_is_killed(
    ray_of_two_cores: None,
    store: LocalStore,
    version: ModelVersion,
    inputs: Path,
    tmp_path: Path,
    service: RayBatchService,
) -> None:
    import ray

    manifest = store.root / "models/unet/versions/1/manifest.json"
    whole = manifest.read_bytes()
    request = BatchRequest(input=str(inputs), output=str(tmp_path / "clean"))
    id = service.prepare("local", request)
    manifest.write_bytes(b"{}")
    service.resume("local", id)
    stopped = _ended(service, id)
    assert stopped.status == "stopped" and stopped.remaining == IMAGES
    assert stopped.detail is not None and "manifest.json is damaged" in stopped.detail

    manifest.write_bytes(whole)
    begun = [service.start("local", request) for _ in range(2)]
    assert [(progress.id, progress.status) for progress in begun] == [(id, "running")] * 2
    ray.kill(ray.get_actor(f"BatchRunner:{id}", namespace="kintsugi"), no_restart=False)
    done = _ended(service, id)
    assert (done.status, done.restored + done.kept, done.refused) == ("done", IMAGES - 1, 1)
    assert len(_ledger(store, id)) == IMAGES
    assert _results(tmp_path / "clean") == _expected(store, version, inputs)
    assert [progress.id for progress in service.list("local")] == [id]


def test_what_cannot_be_begun_leaves_no_batch(
    store: LocalStore, version: ModelVersion, inputs: Path, tmp_path: Path, service: RayBatchService
) -> None:
    there, clean = str(inputs), str(tmp_path / "clean")
    for request, error in (
        (BatchRequest(input=there, output=clean, model="unet@7"), ModelNotFound),
        (BatchRequest(input=str(tmp_path / "nothing"), output=clean), ObjectNotFound),
        (BatchRequest(input=there, output=f"{there}/clean"), ConfigError),
    ):
        with pytest.raises(error):
            service.prepare("local", request)
    with pytest.raises(ConfigError, match="name a model"):
        RayBatchService(store.uri).prepare("local", BatchRequest(input=there, output=clean))
    assert list(store.list("batches/")) == []


def test_a_model_that_was_replaced_is_not_taken_for_the_batchs(
    store: LocalStore, version: ModelVersion, inputs: Path, tmp_path: Path
) -> None:
    batch = make_batch(store.uri, "local", str(inputs), str(tmp_path / "clean"), LoadedModel("unet", 1, "e" * 64))
    with pytest.raises(ConfigError, match="begin another batch"):
        load_published(store.uri, batch, RunOptions())


def test_a_run_needs_an_actor() -> None:
    with pytest.raises(ConfigError, match="at least one actor"):
        RunOptions(concurrency=0)


@pytest.fixture
def no_stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: LocalStore) -> None:
    monkeypatch.setattr(local, "home_folder", lambda: tmp_path / "home")
    monkeypatch.setenv("KINTSUGI_STORE", store.uri)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give an input and an output"),
        ({"input": "raw"}, "give an input and an output"),
        ({"input": "raw", "output": "clean"}, "--model is needed"),
        ({"input": "raw", "resume": "0" * 16}, "give the id alone"),
        ({"resume": "0" * 16, "status": "0" * 16}, "do not go together"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(no_stack: None, arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        commands.batch(**arguments)  # type: ignore[arg-type]


def test_the_verb_finds_what_is_wrong_before_it_joins_a_cluster(
    no_stack: None, version: ModelVersion, inputs: Path, tmp_path: Path
) -> None:
    there, clean = str(inputs), str(tmp_path / "clean")
    with pytest.raises(ModelNotFound, match="there is no model"):
        commands.batch(there, clean, model="unet@9")
    with pytest.raises(ObjectNotFound, match="nothing under"):
        commands.batch(str(tmp_path / "nothing"), clean, model="unet")
    with pytest.raises(ObjectNotFound, match="there is no batch"):
        commands.batch(resume="0" * 16)
    with pytest.raises(StackError, match="kintsugi up"):
        commands.batch(there, clean, model="unet")


def _progress(status: str, **counts: int) -> Progress:
    facts: dict[str, Any] = dict.fromkeys(("restored", "kept", "refused", "failed", "alarms", "remaining"), 0) | counts
    return Progress(
        id="0" * 16, status=status, input="raw", output="clean", model="unet@1", digest="d", white_level=None,
        created="", round=1, total=9, ledger="store/ledger.jsonl", detail=None, **facts,
    )  # type: ignore[arg-type]  # fmt: skip


def test_the_verb_says_what_was_lost_and_where_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    commands._tell(_progress("done", restored=6, kept=1, refused=2, alarms=3), as_json=False)
    assert capsys.readouterr().out.rstrip() == (
        f"batch {'0' * 16} done: 6 restored, 1 there already, 2 refused, 3 with the defect alarm: look at these; "
        "ledger store/ledger.jsonl"
    )
    commands._refuse(_progress("done", restored=9))
    with pytest.raises(KintsugiError, match=r"^2 of 9 images were not restored: store/ledger.jsonl says why"):
        commands._refuse(_progress("done", restored=7, refused=1, failed=1))
    with pytest.raises(RunInterrupted, match=r"its process ended.*'kintsugi batch --resume 0{16}' goes on"):
        commands._refuse(_progress("stopped", remaining=9))


def test_the_modules_load_neither_ray_nor_torch() -> None:
    modules = "kintsugi_serve.batches.service, kintsugi_serve.batches.commands, kintsugi_serve.batches.run"
    code = f"import sys, {modules}; sys.exit(bool({{'ray', 'torch'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
