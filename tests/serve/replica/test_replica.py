import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kintsugi import imaging
from kintsugi.errors import Abandoned, ConfigError, ModelNotFound
from kintsugi.registry import Registry
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import LocalStore, sha256
from kintsugi_serve.decoding.codec import Decoder
from kintsugi_serve.jobs import Answer, Job, LoadedModel, Rejection
from kintsugi_serve.replica.replica import Replica, batching_of, in_turn
from kintsugi_serve.schemas import Settings

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


OfModel = Callable[[Any, Any], Replica]


class Doubtful:
    """Fails on images brighter than `limit`; says the wrong size if asked to."""

    def __init__(self, limit: int = 256, crop: int = 0) -> None:
        self.limit = limit
        self.crop = crop
        self.batches: list[int] = []

    def restore_batch(self, images: Sequence[imaging.Image], masks: Sequence[Any], *, stop: Any) -> list[Any]:
        self.batches.append(len(images))
        if any(int(image.pixels.max()) >= self.limit for image in images):
            raise RuntimeError("out of memory")
        report = SimpleNamespace(
            retention=1.0, added=0.0, alarm=False, abstained=None, to_dict=lambda: {"alarm": False}
        )
        return [
            SimpleNamespace(
                image=imaging.Image(image.pixels[self.crop :], image.format), report=report, defect_map=None
            )
            for image in images
        ]


def _unshelved(load: Any) -> Any:
    return load


@pytest.fixture
def of_model(settings: Settings, source_of: Callable[[Any], Any]) -> OfModel:
    """A replica for one model, which it has not taken into service yet."""
    return lambda model, batching: Replica(settings, batching=batching, shelving=_unshelved, source=source_of(model))


def _in_service(replica: Replica) -> Replica:
    asyncio.run(replica.reconfigure({"model": "unet@1"}))
    return replica


def _served(settings: Settings, one_by_one: Any, reference: str = "unet") -> Replica:
    replica = Replica(settings, batching=one_by_one, shelving=_unshelved)
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
    assert answer.report == {**local.report.to_dict(), "defect_map": None}
    assert (answer.input_sha256, answer.output_sha256) == (sha256(data), sha256(answer.image))
    assert set(answer.timing_ms) == {"decode", "queue", "model", "encode"}
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


def test_images_that_come_together_pass_the_model_together(of_model: OfModel, picture: Any, gathered: Any) -> None:
    model = Doubtful()

    async def ask() -> list[Any]:
        replica = of_model(model, gathered(3))
        await replica.reconfigure({"model": "unet@1"})
        return await asyncio.gather(*(replica.restore(Job(picture((32, 32 + i)))) for i in range(3)))

    answers = asyncio.run(ask())
    assert model.batches == [3]
    assert [imaging.decode(answer.image).size for answer in answers] == [(32, 32), (32, 33), (32, 34)]


def test_an_image_that_breaks_the_model_does_not_take_its_neighbours_along(of_model: OfModel, gathered: Any) -> None:
    files = [imaging.encode(imaging.Image(np.full((8, 8), level, np.uint8))) for level in (10, 250, 20)]

    async def ask() -> list[Any]:
        model = Doubtful(limit=200)
        replica = of_model(model, gathered(3))
        await replica.reconfigure({"model": "unet@1"})
        return await asyncio.gather(*(replica.restore(Job(data)) for data in files))

    first, second, third = asyncio.run(ask())
    assert isinstance(first, Answer) and isinstance(third, Answer)
    assert isinstance(second, Rejection) and second.code == "internal"


def test_an_answer_of_another_size_is_never_given(of_model: OfModel, picture: Any, one_by_one: Any) -> None:
    answer = asyncio.run(_in_service(of_model(Doubtful(crop=1), one_by_one)).restore(Job(picture())))
    assert isinstance(answer, Rejection)
    assert answer.code == "internal"


def test_a_replica_without_a_model_is_not_healthy(settings: Settings, one_by_one: Any) -> None:
    with pytest.raises(ModelNotFound, match="no model"):
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


def test_a_request_may_name_another_published_model(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, picture: Any, one_by_one: Any
) -> None:
    publish(store, tmp_path / "a", seed=1)
    publish(store, tmp_path / "b", seed=2)
    replica = _served(settings, one_by_one, "unet@2")
    answers = [asyncio.run(replica.restore(Job(picture(), model=name))) for name in (None, "unet@1", "unet@2")]
    assert [answer.model.number for answer in answers if isinstance(answer, Answer)] == [2, 1, 2]
    unknown = asyncio.run(replica.restore(Job(picture(), model="unet@9")))
    assert isinstance(unknown, Rejection) and unknown.code == "not_found"
    assert asyncio.run(replica.resolve("unet@1")).number == 1
    assert asyncio.run(replica.resolve(None)).number == 2


def test_a_job_without_time_left_is_not_answered(of_model: OfModel, picture: Any, gathered: Any) -> None:
    model = Doubtful()
    answer = asyncio.run(_in_service(of_model(model, gathered(2))).restore(Job(picture(), budget_s=0.05)))
    assert isinstance(answer, Rejection) and answer.code == "timeout"
    assert model.batches == []


def test_work_for_a_client_that_is_gone_does_not_reach_the_model(
    of_model: OfModel, picture: Any, gathered: Any
) -> None:
    model = Doubtful()

    async def ask() -> Any:
        replica = of_model(model, gathered(2))
        await replica.reconfigure({"model": "unet@1"})
        gone = asyncio.create_task(replica.restore(Job(picture(), budget_s=0.05)))
        await gone
        return await replica.restore(Job(picture((32, 33))))

    assert isinstance(asyncio.run(ask()), Answer)
    assert model.batches == [1]


class Slow(Doubtful):
    """Works on each image until it is told to stop, or that it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.done = threading.Event(), threading.Event()
        self.given_up = 0

    def restore_batch(self, images: Sequence[imaging.Image], masks: Sequence[Any], *, stop: Any) -> list[Any]:
        self.begun.set()
        while not self.done.wait(0.01):
            if stop():
                self.given_up += 1
                raise Abandoned("nobody waits")
        return super().restore_batch(images, masks, stop=stop)


def test_the_model_ends_halfway_when_its_client_goes_away_and_the_next_image_is_answered(
    of_model: OfModel, picture: Any
) -> None:
    model = Slow()

    async def ask() -> Any:
        replica = of_model(model, in_turn)
        await replica.reconfigure({"model": "unet@1"})
        gone = asyncio.create_task(replica.restore(Job(picture())))
        await asyncio.to_thread(model.begun.wait)
        next_one = asyncio.create_task(replica.restore(Job(picture((32, 33)))))
        gone.cancel()
        await asyncio.wait([gone])
        while not model.given_up:
            await asyncio.sleep(0)
        model.done.set()
        return await next_one

    assert isinstance(asyncio.run(ask()), Answer)
    assert (model.given_up, model.batches) == (1, [1])


def test_the_facts_are_written_into_the_file_on_request_and_do_not_change_from_time_to_time(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, picture: Any, one_by_one: Any
) -> None:
    version = publish(store, tmp_path / "a")
    replica = _served(settings, one_by_one)
    for kind in ("png", "tiff"):
        data = picture((40, 48), np.uint16, kind)
        plain, *noted = (asyncio.run(replica.restore(Job(data, embed=embed))) for embed in (False, True, True))
        assert isinstance(plain, Answer) and all(isinstance(answer, Answer) for answer in noted)
        assert noted[0].image == noted[1].image != plain.image
        image = imaging.decode(noted[0].image)
        assert np.array_equal(image.pixels, imaging.decode(plain.image).pixels)
        said = json.loads(imaging.note_of(noted[0].image) or "")
        assert (said["model"], said["model_digest"]) == ("unet@1", version.digest)
        assert said["input_sha256"] == sha256(data)
        assert said["pixels_sha256"] == sha256(image.pixels.tobytes())
    refused = asyncio.run(replica.restore(Job(picture(kind="bmp"), embed=True)))
    assert isinstance(refused, Rejection) and refused.code == "unsupported_format"


def test_the_defect_map_is_answered_where_the_model_predicts_one(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, picture: Any, one_by_one: Any
) -> None:
    publish(store, tmp_path / "a", mask="predicted")
    answer = asyncio.run(_served(settings, one_by_one).restore(Job(picture(), defect_map=True)))
    assert isinstance(answer, Answer) and answer.defect_map is not None
    shown = imaging.decode(answer.defect_map)
    assert (shown.size, shown.bit_depth) == ((40, 48), 8)
    assert answer.report["defect_map"]["max"] == pytest.approx(shown.pixels.max() / 255, abs=1 / 255)


def test_batches_are_filled_by_pixels_on_a_gpu(settings: Settings) -> None:
    async def infer(batch: list[Any]) -> list[Any]:
        return batch

    batched: Any = batching_of(settings.model_copy(update={"device": "cuda", "max_batch_pixels": 1000}))(infer)
    assert batched._get_max_batch_size() == 1000


def test_images_pass_a_cpu_one_by_one_also_when_a_caller_goes_away_meanwhile(settings: Settings) -> None:
    begun: list[Any] = []
    ended: list[Any] = []

    async def infer(batch: list[Any]) -> list[Any]:
        assert begun == ended, "another image is with the model"
        begun.extend(batch)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ended.extend(batch)
        return batch

    async def scenario() -> list[Any]:
        run: Any = batching_of(settings)(infer)
        tasks = [asyncio.create_task(run(name)) for name in "abc"]
        while not begun:
            await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(scenario())
    assert isinstance(first, asyncio.CancelledError)
    assert others == ["b", "c"]
    assert ended == ["a", "b", "c"]


@pytest.mark.parametrize("config", [{}, {"model": None}, {"model": 3}])
def test_a_user_config_without_a_model_is_refused(settings: Settings, one_by_one: Any, config: Any) -> None:
    with pytest.raises(ConfigError, match="user_config"):
        asyncio.run(Replica(settings, batching=one_by_one).reconfigure(config))


@pytest.mark.processes
def test_a_replica_decodes_in_processes_of_its_own(
    settings: Settings, store: LocalStore, tmp_path: Any, publish: Any, picture: Any, one_by_one: Any
) -> None:
    publish(store, tmp_path / "a")

    async def ask() -> list[Any]:
        replica = Replica(settings, batching=one_by_one, shelving=_unshelved)
        await replica.reconfigure({"model": "unet"})
        found = [await replica.restore(Job(data)) for data in (picture(), picture()[:-20], b"GIF89a")]
        assert isinstance(replica._decoder, Decoder)
        replica._decoder.close()
        return found

    good, cut, other = asyncio.run(ask())
    assert isinstance(good, Answer)
    assert (cut.code, other.code) == ("undecodable", "unsupported_format")


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
