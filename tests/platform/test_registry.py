from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import ExperimentConfig
from kintsugi.errors import ConfigError, IntegrityError, ModelNotFound, PreconditionFailed, StoreUnavailable
from kintsugi.models import build_model
from kintsugi.registry import Registry
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import MemoryStore, ObjectStore
from kintsugi.trust.report import Calibration, save_calibration


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_config: ExperimentConfig) -> Path:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, build_model(tiny_config.model), tiny_config, {"score": 2.0}, {"dataset_digest": "d1"})
    return folder


@pytest.fixture
def registry() -> Registry:
    return Registry(MemoryStore())


class FailingStore(MemoryStore):
    """Refuses every write to a key that ends so."""

    def __init__(self, ending: str) -> None:
        super().__init__()
        self.ending = ending

    def put(self, key: str, data: bytes | Path, **conditions: object) -> None:
        if key.endswith(self.ending):
            raise StoreUnavailable("away")
        super().put(key, data, **conditions)


def test_versions_are_numbered_and_carry_what_they_came_from(registry: Registry, checkpoint: Path) -> None:
    first, second = (registry.publish("unet", checkpoint, b"{}") for _ in range(2))
    assert [v.number for v in registry.versions("unet")] == [1, 2]
    assert first.digest == second.digest
    assert (first.dataset_digest, first.scores) == ("d1", {"score": 2.0})
    assert registry.names() == ["unet"]


def test_a_fetched_version_restores_and_is_fetched_once(registry: Registry, checkpoint: Path, tmp_path: Path) -> None:
    version = registry.publish("unet", checkpoint, b"{}")
    folder = registry.fetch(version, tmp_path / "cache")
    assert Restorer.from_checkpoint(folder).model is not None
    for info in list(registry.store.list("models/unet/versions/1/weights")):
        registry.store.delete(info.key)
    assert registry.fetch(version, tmp_path / "cache") == folder


def test_the_calibration_is_published_with_the_model(registry: Registry, checkpoint: Path, tmp_path: Path) -> None:
    plain = registry.publish("unet", checkpoint, b"{}")
    calibration = Calibration(error_scale=1.5)
    save_calibration(checkpoint, calibration)
    version = registry.publish("unet", checkpoint, b"{}")
    assert version.digest != plain.digest
    assert Restorer.from_checkpoint(registry.fetch(version, tmp_path / "cache")).calibration == calibration


def test_a_damaged_cache_is_fetched_again(registry: Registry, checkpoint: Path, tmp_path: Path) -> None:
    version = registry.publish("unet", checkpoint, b"{}")
    folder = registry.fetch(version, tmp_path / "cache")
    (folder / "weights.safetensors").write_bytes(b"damaged")
    assert Restorer.from_checkpoint(registry.fetch(version, tmp_path / "cache")).model is not None


@pytest.mark.parametrize("part", ["weights.safetensors", "config.yaml", "scorecard.json"])
def test_a_flipped_bit_in_the_store_is_never_used(
    registry: Registry, checkpoint: Path, tmp_path: Path, part: str
) -> None:
    version = registry.publish("unet", checkpoint, b"{}")
    key = f"models/unet/versions/1/{part}"
    data = bytearray(registry.store.get(key))
    data[len(data) // 2] ^= 4
    registry.store.put(key, bytes(data))
    with pytest.raises(IntegrityError, match=part):
        registry.fetch(version, tmp_path / "cache")


@pytest.mark.parametrize("ending", ["weights.safetensors", "scorecard.json", "manifest.json"])
def test_publish_leaves_no_version_when_the_upload_fails(checkpoint: Path, ending: str) -> None:
    store = FailingStore(ending)
    registry = Registry(store)
    with pytest.raises(StoreUnavailable):
        registry.publish("unet", checkpoint, b"{}")
    assert registry.versions("unet") == [] and registry.names() == []
    store.ending = "nothing"
    assert registry.publish("unet", checkpoint, b"{}").number in (1, 2)
    assert len(registry.versions("unet")) == 1


def test_publishers_at_the_same_moment_get_a_number_each(registry: Registry, checkpoint: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: registry.publish("unet", checkpoint, b"{}").number, range(8)))
    assert len(set(found)) == 8 and len(registry.versions("unet")) == 8


def test_an_alias_moves_and_each_rollback_takes_back_one_promotion(registry: Registry, checkpoint: Path) -> None:
    for number in (1, 2, 3):
        registry.publish("unet", checkpoint, b"{}")
        registry.promote(f"unet@{number}")
    assert registry.resolve("unet@production").number == 3
    assert registry.rollback("unet").number == 2
    assert registry.rollback("unet").number == 1
    with pytest.raises(ModelNotFound, match="nothing to roll back"):
        registry.rollback("unet")
    moves = [(move.action, move.version) for move in registry.alias_history("unet", "production")]
    assert moves == [("promote", 1), ("promote", 2), ("promote", 3), ("rollback", 2), ("rollback", 1)]


class RacingStore(MemoryStore):
    """Someone else moves the alias between our read and our write."""

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        data, etag = super().get_with_etag(key)
        if "/aliases/" in key:
            self.put(key, data.replace(b'"history"', b' "history"'))
        return data, etag


def test_two_who_move_an_alias_at_once_cannot_both_win(checkpoint: Path) -> None:
    registry = Registry(RacingStore())
    registry.publish("unet", checkpoint, b"{}")
    registry.promote("unet@1")
    with pytest.raises(PreconditionFailed):
        registry.promote("unet@1")


@pytest.mark.parametrize("expected", [None, 1, 3])
def test_an_alias_that_moved_meanwhile_stays_where_it_is(
    registry: Registry, checkpoint: Path, expected: int | None
) -> None:
    for _ in range(3):
        registry.publish("unet", checkpoint, b"{}")
    registry.promote("unet@2", expected=None)
    with pytest.raises(PreconditionFailed, match=r"unet@production named .* and now names version 2"):
        registry.promote("unet@3", expected=expected)
    assert registry.resolve("unet@production").number == 2
    registry.promote("unet@3", expected=2)
    assert registry.resolve("unet@production").number == 3


def test_an_alias_that_should_be_there_and_is_not_is_never_created(registry: Registry, checkpoint: Path) -> None:
    registry.publish("unet", checkpoint, b"{}")
    with pytest.raises(PreconditionFailed, match="named version 1 and now names nothing"):
        registry.promote("unet@1", expected=1)
    assert registry.aliases("unet") == {}


@pytest.mark.parametrize("ref", ["unet@production", "unet@7", "other", "other@1"])
def test_what_does_not_exist_is_named(registry: Registry, checkpoint: Path, ref: str) -> None:
    registry.publish("unet", checkpoint, b"{}")
    with pytest.raises(ModelNotFound, match=ref.partition("@")[0]):
        registry.resolve(ref)


@pytest.mark.parametrize("name", ["", "..", "a/b", "Upper", "-x", "a" * 65])
def test_names_that_could_leave_their_folder_are_refused(registry: Registry, checkpoint: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="not a name"):
        registry.publish(name, checkpoint, b"{}")


def test_a_name_alone_is_its_newest_version(registry: Registry, checkpoint: Path) -> None:
    store: ObjectStore = registry.store
    for _ in range(2):
        registry.publish("unet", checkpoint, b"{}")
    assert registry.resolve("unet").number == 2
    assert Registry(store).scorecard(registry.resolve("unet@1")) == b"{}"
