import asyncio
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kintsugi import imaging
from kintsugi.errors import ConfigError, ImageError, IntegrityError, KintsugiError, ModelNotFound
from kintsugi.registry import Registry
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import LocalStore
from kintsugi_serve.replica import Loaded, Replica, check_model
from kintsugi_serve.schemas import Answer, Job, LoadedModel, Rejection, Settings

KINDS: list[tuple[Any, type, imaging.Format]] = [
    ((40, 48), np.uint8, "png"),
    ((40, 48), np.uint16, "png"),
    ((40, 48, 3), np.uint8, "png"),
    ((40, 48, 3), np.uint16, "png"),
    ((40, 48), np.uint16, "tiff"),
    ((40, 48, 3), np.uint16, "tiff"),
    ((40, 48), np.uint8, "bmp"),
    ((41, 47), np.uint8, "jpeg"),
]


class Doubtful:
    """Fails on images brighter than `limit`; says the wrong size if asked to."""

    def __init__(self, limit: int = 256, crop: int = 0) -> None:
        self.limit = limit
        self.crop = crop
        self.batches: list[int] = []

    def restore_batch(self, images: Sequence[imaging.Image], masks: Sequence[Any]) -> list[Any]:
        self.batches.append(len(images))
        if any(int(image.pixels.max()) >= self.limit for image in images):
            raise RuntimeError("out of memory")
        report = SimpleNamespace(retention=1.0, added=0.0, alarm=False, to_dict=lambda: {"alarm": False})
        return [
            SimpleNamespace(image=imaging.Image(image.pixels[self.crop :], image.format), report=report)
            for image in images
        ]


def _replica(settings: Settings, model: Any, batching: Any) -> Replica:
    version = LoadedModel("unet", 1, "d" * 64)
    replica = Replica(settings, batching=batching, load=lambda ref, s, current: Loaded(model, version))
    asyncio.run(replica.reconfigure({"model": "unet@1"}))
    return replica


def _served(settings: Settings, one_by_one: Any, reference: str = "unet") -> Replica:
    replica = Replica(settings, batching=one_by_one)
    asyncio.run(replica.reconfigure({"model": reference}))
    return replica


@pytest.mark.parametrize(("shape", "dtype", "kind"), KINDS)
def test_the_answer_has_the_format_size_depth_and_colour_of_the_question(
    settings: Settings,
    store: LocalStore,
    tmp_path: Any,
    publish: Any,
    picture: Any,
    one_by_one: Any,
    shape: Any,
    dtype: type,
    kind: imaging.Format,
) -> None:
    publish(store, tmp_path / "a")
    answer = asyncio.run(_served(settings, one_by_one).restore(Job(picture(shape, dtype, kind))))
    assert isinstance(answer, Answer)
    image = imaging.decode(answer.image)
    assert (image.format, image.pixels.shape, image.pixels.dtype) == (kind, shape, dtype)
    assert answer.format == kind


def test_the_answer_is_the_restorers_to_the_byte(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, picture: Any, one_by_one: Any
) -> None:
    version = publish(store, tmp_path / "a")
    data = picture((40, 48), np.uint16, "tiff")
    answer = asyncio.run(_served(settings, one_by_one).restore(Job(data)))
    local = Restorer.from_checkpoint(Registry(store).fetch(version)).restore(imaging.decode(data))
    assert isinstance(answer, Answer)
    assert answer.image == imaging.encode(local.image)
    assert answer.report == local.report.to_dict()
    assert answer.model == LoadedModel("unet", 1, version.digest)


def test_bad_input_is_an_answer_with_its_code(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, picture: Any, mask_file: Any, one_by_one: Any
) -> None:
    publish(store, tmp_path / "a", mask="given")
    small = settings.model_copy(update={"max_pixels": 2000})
    replica = _served(small, one_by_one)
    image = picture()
    jobs = {
        "unsupported_format": Job(b"GIF89a" + bytes(100)),
        "undecodable": Job(image[: len(image) // 2], mask_file()),
        "too_large": Job(picture((50, 50))),
        "over_white_level": Job(image, mask_file(), white_level=100),
        "mismatch": Job(image, mask_file((20, 20))),
        "mask_required": Job(image),
    }
    for code, job in jobs.items():
        answer = asyncio.run(replica.restore(job))
        assert isinstance(answer, Rejection), code
        assert answer.code == code
    assert isinstance(asyncio.run(replica.restore(Job(image, mask_file()))), Answer)


def test_images_that_come_together_pass_the_model_together(settings: Settings, picture: Any, gathered: Any) -> None:
    model = Doubtful()

    async def ask() -> list[Any]:
        replica = Replica(settings, batching=gathered(3), load=lambda *_: Loaded(model, LoadedModel("unet", 1, "d")))
        await replica.reconfigure({"model": "unet@1"})
        return await asyncio.gather(*(replica.restore(Job(picture((32, 32 + i)))) for i in range(3)))

    answers = asyncio.run(ask())
    assert model.batches == [3]
    assert [imaging.decode(answer.image).size for answer in answers] == [(32, 32), (32, 33), (32, 34)]


def test_an_image_that_breaks_the_model_does_not_take_its_neighbours_along(settings: Settings, gathered: Any) -> None:
    files = [imaging.encode(imaging.Image(np.full((8, 8), level, np.uint8))) for level in (10, 250, 20)]

    async def ask() -> list[Any]:
        model = Doubtful(limit=200)
        replica = Replica(settings, batching=gathered(3), load=lambda *_: Loaded(model, LoadedModel("unet", 1, "d")))
        await replica.reconfigure({"model": "unet@1"})
        return await asyncio.gather(*(replica.restore(Job(data)) for data in files))

    first, second, third = asyncio.run(ask())
    assert isinstance(first, Answer) and isinstance(third, Answer)
    assert isinstance(second, Rejection) and second.code == "internal"


def test_an_answer_of_another_size_is_never_given(settings: Settings, picture: Any, one_by_one: Any) -> None:
    answer = asyncio.run(_replica(settings, Doubtful(crop=1), one_by_one).restore(Job(picture())))
    assert isinstance(answer, Rejection)
    assert answer.code == "internal"


def test_a_replica_without_a_model_is_not_healthy(settings: Settings, one_by_one: Any) -> None:
    with pytest.raises(ConfigError, match="no model"):
        Replica(settings, batching=one_by_one).check_health()


def test_reconfigure_puts_the_new_version_in_place(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, picture: Any, one_by_one: Any
) -> None:
    publish(store, tmp_path / "a", seed=1)
    replica = _served(settings, one_by_one)
    before = asyncio.run(replica.restore(Job(picture())))
    second = publish(store, tmp_path / "b", seed=2)
    asyncio.run(replica.reconfigure({"model": "unet@2"}))
    after = asyncio.run(replica.restore(Job(picture())))
    assert isinstance(before, Answer) and isinstance(after, Answer)
    assert (before.model.number, after.model.number) == (1, 2)
    assert after.model.digest == second.digest
    assert before.image != after.image


def test_a_model_that_does_not_exist_leaves_the_old_one_in_place(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, picture: Any, one_by_one: Any
) -> None:
    publish(store, tmp_path / "a")
    replica = _served(settings, one_by_one)
    with pytest.raises(ModelNotFound):
        asyncio.run(replica.reconfigure({"model": "unet@9"}))
    assert asyncio.run(replica.describe()).number == 1
    assert isinstance(asyncio.run(replica.restore(Job(picture()))), Answer)


def test_damaged_weights_are_never_served(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, one_by_one: Any
) -> None:
    publish(store, tmp_path / "a", seed=1)
    replica = _served(settings, one_by_one)
    publish(store, tmp_path / "b", seed=2)
    key = "models/unet/versions/2/weights.safetensors"
    data = bytearray(store.get(key))
    data[-5] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(IntegrityError):
        asyncio.run(replica.reconfigure({"model": "unet@2"}))
    assert asyncio.run(replica.describe()).number == 1


def test_the_same_version_is_not_loaded_twice(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, one_by_one: Any
) -> None:
    publish(store, tmp_path / "a")
    replica = _served(settings, one_by_one)
    model = replica._current().model
    asyncio.run(replica.reconfigure({"model": "unet"}))
    assert replica._current().model is model


@pytest.mark.parametrize("config", [{}, {"model": None}, {"model": 3}])
def test_a_user_config_without_a_model_is_refused(settings: Settings, one_by_one: Any, config: Any) -> None:
    with pytest.raises(ConfigError, match="user_config"):
        asyncio.run(Replica(settings, batching=one_by_one).reconfigure(config))


class Refusing:
    def restore_batch(self, images: Sequence[imaging.Image], masks: Sequence[Any]) -> list[Any]:
        return [ImageError("mismatch", "no")]


@pytest.mark.parametrize("model", [Refusing(), Doubtful(crop=1)])
def test_a_model_that_cannot_restore_a_plain_image_is_not_taken(model: Any) -> None:
    with pytest.raises(KintsugiError, match="publish another version"):
        check_model(model, LoadedModel("unet", 1, "d"))


def test_published_lists_names_aliases_and_versions(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, one_by_one: Any
) -> None:
    first = publish(store, tmp_path / "a")
    Registry(store).promote("unet@1")
    (found,) = asyncio.run(_served(settings, one_by_one).published())
    assert (found["name"], found["aliases"]) == ("unet", {"production": 1})
    assert found["versions"] == [{"version": 1, "digest": first.digest, "created": first.created}]


def test_the_ingress_side_loads_no_torch() -> None:
    code = "import sys, kintsugi_serve.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
