import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kintsugi import imaging
from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import ExperimentConfig, with_values
from kintsugi.models import build_model
from kintsugi.registry import ModelVersion, Registry
from kintsugi.storage import LocalStore, sha256
from kintsugi_serve.jobs import Answer, Job, LargeJob, LoadedModel, Rejection, Serving
from kintsugi_serve.replica.replica import Decoded, Infer, Inferred
from kintsugi_serve.replica.serving import Loaded
from kintsugi_serve.schemas import Settings

VERSION = LoadedModel("unet", 3, "d" * 64)
TINY = {"model.levels": 2, "model.blocks": 1, "model.base": 4, "model.skips": [True, True], "model.reduction": [2, 2]}


Batched = Callable[[Decoded], Awaitable[Inferred]]


class EchoBackend:
    """Answers with the image itself; remembers the jobs. `refusal` or `rejection` comes first."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.large: list[LargeJob] = []
        self.alarm = False
        self.failure: Exception | None = None
        self.rejection: Rejection | None = None

    async def restore(self, job: Job) -> Answer | Rejection:
        self.jobs.append(job)
        if self.failure is not None:
            raise self.failure
        if self.rejection is not None:
            return self.rejection
        report = {"retention": 0.9876, "added": 0.01, "alarm": self.alarm}
        digest = sha256(job.image)
        shown = b"map" if job.defect_map else None
        return Answer(job.image, "png", VERSION, 0.9876, self.alarm, report, digest, digest, shown, {"model": 1.5})

    async def restore_large(self, job: LargeJob) -> Rejection:
        self.large.append(job)
        return Rejection("too_large", "no TIFF")

    async def describe(self) -> Serving:
        if self.failure is not None:
            raise self.failure
        return Serving(VERSION)

    async def resolve(self, model: str | None) -> LoadedModel:
        return VERSION if model is None else LoadedModel(model, 1, "e" * 64)

    async def published(self) -> list[dict[str, object]]:
        return []


class InPlace:
    """Decodes without a process of its own."""

    async def decode(
        self, image: bytes, mask: bytes | None = None, *, white_level: int | None = None, max_pixels: int
    ) -> tuple[imaging.Image, np.ndarray | None]:
        known = imaging.decode_mask(mask, max_pixels=max_pixels) if mask is not None else None
        return imaging.decode(image, white_level=white_level, max_pixels=max_pixels), known


class One:
    """A source of one model, whatever is asked for."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def find(self, reference: str) -> Any:
        return SimpleNamespace(ref="unet@1", name="unet", number=1, digest="d" * 64)

    def load(self, version: Any) -> Loaded:
        return Loaded(self.model, LoadedModel("unet", 1, "d" * 64))

    def fallbacks(self, reference: str) -> list[Any]:
        return []

    def keep(self, reference: str, version: Any) -> None:
        return None


def _one_by_one(infer: Infer) -> Batched:
    """Batches of one, for a replica outside Ray."""

    async def run(item: Decoded) -> Inferred:
        return (await infer([item]))[0]

    return run


def _gathered(size: int) -> Callable[[Infer], Batched]:
    """Batches of exactly `size`, for a replica outside Ray."""

    def batching(infer: Infer) -> Batched:
        waiting: list[tuple[Decoded, asyncio.Future[Inferred]]] = []

        async def run(item: Decoded) -> Inferred:
            future: asyncio.Future[Inferred] = asyncio.get_running_loop().create_future()
            waiting.append((item, future))
            if len(waiting) == size:
                batch = waiting.copy()
                waiting.clear()
                for (_, each), result in zip(batch, await infer([i for i, _ in batch]), strict=True):
                    if not each.done():
                        each.set_result(result)
            return await future

        return run

    return batching


def _picture(shape: tuple[int, ...] = (40, 48), dtype: type = np.uint8, kind: imaging.Format = "png") -> bytes:
    """A file with a ramp, a defect and noise."""
    top = np.iinfo(dtype).max
    noise = np.random.default_rng(1).normal(0, top * 0.02, shape)
    ramp = np.linspace(0.2, 0.7, shape[1]).reshape(1, -1, *[1] * (len(shape) - 2)) * top
    pixels = ramp + noise
    pixels[10:14, 12:20] = top * 0.95
    return imaging.encode(imaging.Image(np.clip(pixels, 0, top).astype(dtype), kind, int(top)))


def _mask(shape: tuple[int, int] = (40, 48)) -> bytes:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[10:14, 12:20] = True
    return imaging.encode_mask(mask)


def _publish(store: LocalStore, folder: Path, mask: str = "none", seed: int = 0) -> ModelVersion:
    """A tiny untrained model under the name `unet`."""
    torch.manual_seed(seed)
    config = with_values(ExperimentConfig(), {**TINY, "model.mask": mask, "loss.mask": 0.1 * (mask == "predicted")})
    save_checkpoint(folder, build_model(config.model).eval(), config, {}, {})
    return Registry(store).publish("unet", folder, b"{}")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setenv("KINTSUGI_CACHE", str(tmp_path / "cache"))
    return LocalStore(tmp_path / "store")


@pytest.fixture
def settings(store: LocalStore) -> Settings:
    return Settings(store=str(store.root))


@pytest.fixture
def source_of() -> object:
    return One


@pytest.fixture
def one_by_one() -> object:
    return _one_by_one


@pytest.fixture(autouse=True)
def _no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas decode in place, except where a test is about that."""
    if request.node.get_closest_marker("processes") is None:
        monkeypatch.setattr("kintsugi_serve.replica.replica.decoder_of", lambda settings: InPlace())


@pytest.fixture
def gathered() -> object:
    return _gathered


@pytest.fixture
def picture() -> object:
    return _picture


@pytest.fixture
def mask_file() -> object:
    return _mask


@pytest.fixture
def publish() -> object:
    return _publish


@pytest.fixture
def echo() -> EchoBackend:
    return EchoBackend()


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> str:
    """A target of a decoder's child that does what the image says."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return "hostile_target:decode"


@pytest.fixture
def hostile_strips(hostile: str) -> str:
    """As `hostile`, for a child that unpacks a large image."""
    return hostile.replace("decode", "unpack")
