"""Restoring blocks without Ray, then rounds and services on a real Ray of two cores."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kintsugi.errors import ConfigError, ModelNotFound, ObjectNotFound
from kintsugi.imaging import decode, encode
from kintsugi.registry import ModelVersion
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import LocalStore
from kintsugi_serve.batch import Batch, BatchRequest, Progress, make_batch
from kintsugi_serve.batch_records import Records
from kintsugi_serve.batch_run import RunOptions, load_published, run_batch
from kintsugi_serve.batch_service import RayBatchService, resolve_here
from kintsugi_serve.schemas import LoadedModel

IMAGES = 12


@pytest.fixture(scope="module")
def ray_of_two_cores() -> Iterator[None]:
    import ray

    # The paths of Ray's sockets must stay short.
    folder = tempfile.mkdtemp(prefix="kb-", dir="/tmp")
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        environment.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        environment.setenv("KINTSUGI_CACHE", f"{folder}/cache")
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


def _expected(restorer: Restorer, source: Path) -> bytes:
    return encode(restorer.restore(decode(source.read_bytes())).image)


def test_every_image_has_one_line_though_an_actor_was_killed(
    ray_of_two_cores: None, store: LocalStore, publish: Callable[..., ModelVersion], inputs: Path, tmp_path: Path
) -> None:
    version = publish(store, tmp_path / "a")
    batch = make_batch(store.uri, "local", str(inputs), str(tmp_path / "clean"), LoadedModel("unet", 1, version.digest))
    killed = tmp_path / "killed"

    def load(store_uri: str, batch: Batch, options: RunOptions) -> Any:
        model = load_published(store_uri, batch, options)

        class Mortal:
            def restore(self, image: object) -> object:
                if image.size[0] == 37 and not killed.exists():
                    killed.write_text(str(os.getpid()))
                    os._exit(1)
                return model.restore(image)

        return Mortal()

    records = Records(store, batch)
    plan = records.next_plan()
    assert plan is not None and plan.total == IMAGES
    blocks: list[int] = []
    t = time.time()
    done = run_batch(records, plan, store.uri, RunOptions(2), load=load, progress=lambda c: blocks.append(c.total))
    print("took", time.time() - t)
    for q in sorted((store.root).rglob("*/1/*/*"), key=lambda q: q.stat().st_mtime):
        print(q.name, q.stat().st_mtime - t)
    print(killed.stat().st_mtime - t)
    assert killed.exists()
    assert done.totals.total == IMAGES == sum(blocks)
