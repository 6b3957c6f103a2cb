"""Images too large to be held, from store to store: over the routes, a replica in this process, and real children."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from kintsugi import imaging
from kintsugi.config import ExperimentConfig, with_values
from kintsugi.errors import Abandoned
from kintsugi.models import build_model
from kintsugi.restore.restorer import Restorer, RestoreSettings
from kintsugi.storage import LocalStore, sha256
from kintsugi_serve.access.addresses import S3Address
from kintsugi_serve.access.keys import Key, sha256_of
from kintsugi_serve.decoding import scratch
from kintsugi_serve.ingress.api import build_api
from kintsugi_serve.jobs import Job, LargeJob, Rejection
from kintsugi_serve.replica.replica import Replica
from kintsugi_serve.schemas import Refusal, Settings

ROOT = "s3://plant/kintsugi"
SMALL = {"max_body_bytes": 2048, "max_pixels": 4096, "follow_s": 0}
"""Limits that make small images large."""
TINY = {"model.levels": 1, "model.blocks": 1, "model.base": 4, "model.skips": [True], "model.reduction": [2]}
PREDICTS = {"model.mask": "predicted", "loss.mask": 0.1, "data.mask_dropout": 0.0}


class Counted:
    """A model that counts the large images that it restored."""

    def __init__(self, restorer: Restorer) -> None:
        self.restorer, self.large = restorer, 0

    def restore_batch(self, *images: Any, **options: Any) -> Any:
        return self.restorer.restore_batch(*images, **options)

    def restore_strips(self, *sources: Any, **options: Any) -> Any:
        self.large += 1
        return self.restorer.restore_strips(*sources, **options)


class Here:
    """A backend that is a replica in this process."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.asked: list[LargeJob] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replica, name)

    async def restore_large(self, job: LargeJob) -> Any:
        self.asked.append(job)
        return await self.replica.restore_large(job)


class Plant:
    """A service over stores in folders."""

    def __init__(self, folder: Path, model: Any, source: Any, **settings: Any) -> None:
        self.folder, self.model = folder, model
        self.settings = Settings(store=ROOT, **{**SMALL, **settings})
        self.replica = Replica(self.settings, shelving=lambda load: load, source=source, open_root=self.store)
        asyncio.run(self.replica.reconfigure({"model": "unet@1"}))
        self.backend: Any = Here(self.replica)
        self.client = TestClient(build_api(self.settings, self.backend, open_root=self.store))

    def store(self, uri: str) -> LocalStore:
        folder = self.folder / uri.removeprefix("s3://").rstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        return LocalStore(folder)

    def ask(self, key: str = "", **job: Any) -> Any:
        words = {name: f"{ROOT}/{at}" if not str(at).startswith("s3:") and name in ("input", "output", "mask") else at
                 for name, at in job.items()}  # fmt: skip
        return self.client.post("/v1/restore/s3", json=words, headers={"X-API-Key": key} if key else {})

    def objects(self) -> list[str]:
        return [info.key for info in self.store(ROOT).list("results/") if not info.key.endswith(".json")]

    @property
    def scratch(self) -> list[Path]:
        folder = self.folder / "cache" / "scratch"
        return list(folder.iterdir()) if folder.exists() else []


@pytest.fixture
def restorer() -> Restorer:
    torch.manual_seed(0)
    model = build_model(with_values(ExperimentConfig(), {**TINY, **PREDICTS}).model).eval()
    for weights in model.parameters():
        weights.data.add_(0.02 * torch.randn(weights.shape))
    return Restorer(model, settings=RestoreSettings(tile=128, halo=16))


@pytest.fixture
def plant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restorer: Restorer, source_of: Callable[[Any], Any]
) -> Callable[..., Plant]:
    monkeypatch.setenv("KINTSUGI_CACHE", str(tmp_path / "cache"))

    def build(model: Any = None, **settings: Any) -> Plant:
        model = model or Counted(restorer)
        return Plant(tmp_path, model, source_of(model), **settings)

    return build


def _pixels(height: int = 300, width: int = 90, dtype: type = np.uint16) -> NDArray[Any]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 4000 if dtype is np.uint16 else 256, (height, width)).astype(dtype)


def _tiff(folder: LocalStore, key: str, pixels: NDArray[Any], **options: Any) -> bytes:
    path = folder.root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, **{"photometric": "minisblack", **options})
    return path.read_bytes()


# ---------------------------------------------------------------------------- the way from S3 to S3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_long_tiff_comes_back_with_the_pixels_and_the_report_of_one_restored_whole(
    plant: Callable[..., Plant], restorer: Restorer, dtype: type
) -> None:
    service = plant()
    level = 4095 if dtype is np.uint16 else None
    data = _tiff(service.store(ROOT), "in/a.tif", _pixels(17_000, 128, dtype), compression="zlib", rowsperstrip=50)
    answer = service.ask(input="in/a.tif", output="out/a.tif", white_level=level)
    assert answer.status_code == 200, answer.text
    whole = restorer.restore(imaging.decode(data, white_level=level))
    restored = imaging.decode(service.store(ROOT).get("out/a.tif"))
    np.testing.assert_array_equal(restored.pixels, whole.image.pixels)
    assert not np.array_equal(restored.pixels, imaging.decode(data).pixels)
    assert restored.tags == whole.image.tags
    told = answer.json()
    report = dict(told["report"])
    shown = report.pop("defect_map")
    assert report == whole.report.to_dict()
    assert whole.defect_map is not None
    assert shown == pytest.approx({"max": whole.defect_map.max(), "mean": whole.defect_map.mean(), "area":
                                   (whole.defect_map > 0.5).mean()}, abs=1e-6)  # fmt: skip
    assert told["input_sha256"] == sha256(data)
    assert told["output_sha256"] == sha256(service.store(ROOT).get("out/a.tif"))
    assert answer.headers["x-kintsugi-output-sha256"] == told["output_sha256"]
    assert service.scratch == []


def test_what_is_asked_again_is_not_restored_again(plant: Callable[..., Plant]) -> None:
    service = plant()
    _tiff(service.store(ROOT), "in/a.tif", _pixels())
    first, again = (service.ask(input="in/a.tif", output=f"out/{name}.tif") for name in "ab")
    bare = service.ask(input="in/a.tif")
    assert [answer.status_code for answer in (first, again, bare)] == [200] * 3
    assert service.model.large == 1
    assert len(service.objects()) == 1
    assert [answer.json()["created"] for answer in (first, again, bare)] == [True, True, False]
    assert {answer.json()["result"] for answer in (first, again, bare)} == {
        f"{service.store(ROOT).uri}/{service.objects()[0]}"
    }
    assert service.store(ROOT).get("out/a.tif") == service.store(ROOT).get("out/b.tif")
    assert service.ask(input="in/a.tif", output="out/a.tif").json()["created"] is False
    assert service.ask(input="in/a.tif", white_level=5000).json()["created"] is True
    assert service.scratch == []


def test_other_bytes_at_the_output_are_not_overwritten(plant: Callable[..., Plant]) -> None:
    service = plant()
    data = _tiff(service.store(ROOT), "in/a.tif", _pixels())
    for name, bytes_there in (("other", b"mine"), ("long", bytes(len(data)))):
        service.store(ROOT).put(f"out/{name}.tif", bytes_there)
        answer = service.ask(input="in/a.tif", output=f"out/{name}.tif")
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        assert service.store(ROOT).get(f"out/{name}.tif") == bytes_there
    assert service.scratch == []


def test_a_result_that_was_damaged_is_not_given(plant: Callable[..., Plant]) -> None:
    service = plant()
    _tiff(service.store(ROOT), "in/a.tif", _pixels())
    service.ask(input="in/a.tif")
    service.store(ROOT).put(service.objects()[0], b"damaged")
    answer = service.ask(input="in/a.tif")
    assert (answer.status_code, answer.json()["code"]) == (502, "store_failed")
    assert "results/" not in answer.json()["detail"]


def test_a_small_file_of_many_pixels_goes_the_same_way(plant: Callable[..., Plant]) -> None:
    service = plant(max_body_bytes=2**20)
    _tiff(service.store(ROOT), "in/a.tif", np.zeros((300, 90), np.uint8), compression="zlib")
    assert service.ask(input="in/a.tif").status_code == 200
    assert service.model.large == 1


def test_a_large_image_of_another_format_is_told_of_tiff_and_not_fetched(
    plant: Callable[..., Plant], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = plant()
    monkeypatch.setattr(LocalStore, "download", lambda *words: pytest.fail("it was fetched"))
    service.store(ROOT).put("in/a.png", imaging.encode(imaging.Image(_pixels(), "png", 65535)))
    answer = service.ask(input="in/a.png")
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert "save it as TIFF" in answer.json()["detail"]
    other = plant(max_body_bytes=2**20).ask(input="in/a.png")
    assert (other.status_code, other.json()["code"]) == (413, "too_large")
    assert "as a TIFF it may be larger" in other.json()["detail"]
    assert service.scratch == []


def test_a_service_may_take_no_large_images(plant: Callable[..., Plant]) -> None:
    service = plant(max_streamed_pixels=0)
    _tiff(service.store(ROOT), "in/a.tif", _pixels())
    answer = service.ask(input="in/a.tif")
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert service.backend.asked == []


def test_a_tenant_reaches_its_own_prefixes_only_also_with_large_images(plant: Callable[..., Plant]) -> None:
    keys = tuple(
        Key(tenant=f"line-{n}", sha256=sha256_of(f"key-{n}"), prefixes=(f"s3://plant/line-{n}/",)) for n in (1, 2)
    )
    service = plant(keys=keys)
    for line in (1, 2):
        _tiff(service.store(f"s3://plant/line-{line}"), "in/a.tif", _pixels())
    own = "s3://plant/line-1/in/a.tif"
    for job in ({"input": "s3://plant/line-2/in/a.tif"}, {"input": own, "mask": "s3://plant/line-2/in/a.tif"},
                {"input": own, "output": "s3://plant/line-2/out.tif"}, {"input": "s3://plant/line-1/../line-2/in/a.tif"},
                {"input": own, "output": f"{ROOT}/results/x"}):  # fmt: skip
        answer = service.ask("key-1", **job)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert service.backend.asked == []
    found = [service.ask(f"key-{n}", input=f"s3://plant/line-{n}/in/a.tif").json()["result"] for n in (1, 2)]
    assert [uri.split("/results/")[1].split("/")[0] for uri in found] == ["line-1", "line-2"]
    assert service.model.large == 2


# ---------------------------------------------------------------------------- masks and levels


def test_a_mask_comes_in_strips_too(plant: Callable[..., Plant], restorer: Restorer) -> None:
    service = plant()
    data = _tiff(service.store(ROOT), "in/a.tif", _pixels())
    mask = np.zeros((300, 90), np.uint8)
    mask[100:140, 20:60] = 1
    _tiff(service.store(ROOT), "in/m.tif", mask)
    answer = service.ask(input="in/a.tif", mask="in/m.tif", output="out/a.tif")
    assert answer.status_code == 200
    wanted = restorer.restore(imaging.decode(data), mask > 0).image.pixels
    np.testing.assert_array_equal(imaging.decode(service.store(ROOT).get("out/a.tif")).pixels, wanted)
    assert not np.array_equal(wanted, restorer.restore(imaging.decode(data)).image.pixels)
    assert service.ask(input="in/a.tif").json()["result"] != answer.json()["result"]


def test_a_mask_of_another_format_or_size_is_refused(plant: Callable[..., Plant]) -> None:
    service = plant()
    _tiff(service.store(ROOT), "in/a.tif", _pixels())
    _tiff(service.store(ROOT), "in/m.tif", np.ones((301, 90), np.uint8))
    service.store(ROOT).put("in/m.png", imaging.encode_mask(np.ones((300, 90), np.bool_)))
    for mask, code, sentence in (("in/m.png", "too_large", "also a mask"), ("in/m.tif", "mismatch", "90 x 301")):
        answer = service.ask(input="in/a.tif", mask=mask)
        assert answer.json()["code"] == code
        assert sentence in answer.json()["detail"]


@pytest.mark.parametrize(("level", "sentence"), [(3000, "above the white level 3000"), (70000, "70000 does not fit")])
def test_a_wrong_white_level_is_refused(plant: Callable[..., Plant], level: int, sentence: str) -> None:
    service = plant()
    _tiff(service.store(ROOT), "in/a.tif", _pixels())
    answer = service.ask(input="in/a.tif", white_level=level)
    assert (answer.status_code, answer.json()["code"]) == (422, "over_white_level")
    assert sentence in answer.json()["detail"]
    assert (service.objects(), service.scratch) == ([], [])


# ---------------------------------------------------------------------------- one model and one disk for all


def test_a_disk_without_room_refuses_before_anything_is_fetched(
    plant: Callable[..., Plant], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = plant()
    _tiff(service.store(ROOT), "in/a.tif", _pixels())
    usage = shutil.disk_usage(service.folder)._replace(free=scratch.SPARE_BYTES + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(LocalStore, "download", lambda *words: pytest.fail("it was fetched"))
    answer = service.ask(input="in/a.tif")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "KINTSUGI_CACHE" in answer.json()["detail"] and int(answer.headers["retry-after"]) >= 1
    assert service.scratch == []


class Slow(Counted):
    """Works at a large image until small ones were restored, and asks before each step whether to stop."""

    small = 0

    def restore_batch(self, *images: Any, **options: Any) -> Any:
        self.small += 1
        return super().restore_batch(*images, **options)

    def restore_strips(self, source: Any, write: Any, mask: Any = None, *, maps: Any = None, stop: Any = None) -> Any:
        while self.small < 3:
            if stop():
                raise Abandoned("gone")
        return super().restore_strips(source, write, mask, maps=maps, stop=stop)


def _job(budget_s: float = 60) -> LargeJob:
    return LargeJob("local", S3Address(ROOT, "in/a.tif"), budget_s=budget_s)


@pytest.mark.timeout(120)
def test_small_images_pass_while_a_large_one_is_at_work(
    plant: Callable[..., Plant], restorer: Restorer, picture: Any
) -> None:
    service = plant(Slow(restorer))
    _tiff(service.store(ROOT), "in/a.tif", _pixels())

    async def together() -> list[Any]:
        large = asyncio.create_task(service.replica.restore_large(_job()))
        small = [service.replica.restore(Job(picture((40, 48)))) for _ in range(3)]
        return [*await asyncio.gather(*small), await large]

    assert not any(isinstance(answer, Rejection) for answer in asyncio.run(together()))


@pytest.mark.timeout(120)
def test_a_large_image_that_nobody_waits_for_leaves_the_model_and_the_disk(
    plant: Callable[..., Plant], restorer: Restorer
) -> None:
    service = plant(Slow(restorer))
    _tiff(service.store(ROOT), "in/a.tif", _pixels())

    async def late() -> Any:
        answer = await service.replica.restore_large(_job(budget_s=0.5))
        async with service.replica._one_large:  # free when the work has ended
            return answer

    answer = asyncio.run(late())
    assert isinstance(answer, Rejection)
    assert answer.code == "timeout" and "batch" in answer.detail
    assert (service.objects(), service.scratch) == ([], [])


def test_who_asks_for_too_much_over_http_is_told_of_batches(plant: Callable[..., Plant], restorer: Restorer) -> None:
    service = plant()
    _tiff(service.store(ROOT), "in/a.tif", _pixels())

    async def late(job: LargeJob) -> Any:
        raise Refusal("timeout", f"no answer within {job.budget_s:g} s: send smaller images")

    service.backend.restore_large = late
    answer = service.ask(input="in/a.tif")
    assert (answer.status_code, answer.json()["code"]) == (503, "timeout")
    assert "in a batch" in answer.json()["detail"]
