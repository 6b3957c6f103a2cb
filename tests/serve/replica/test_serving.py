"""Which model is in service: good ones come, bad ones are refused, and the old one goes on."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kintsugi import imaging
from kintsugi.errors import ModelNotFound, StoreUnavailable
from kintsugi.manifest import MANIFEST, make_manifest
from kintsugi.registry import Registry, version_key
from kintsugi.restore.golden import GOLDEN
from kintsugi.storage import LocalStore, ObjectStore
from kintsugi_serve.replica.serving import InService, Others, Published
from kintsugi_serve.schemas import Settings

Publish = Callable[..., Any]


@pytest.fixture
def promoted(store: LocalStore, tmp_path: Path, publish: Publish) -> Registry:
    """Two versions, the first of them in production."""
    publish(store, tmp_path / "a", seed=1)
    publish(store, tmp_path / "b", seed=2)
    registry = Registry(store)
    registry.promote("unet@1")
    return registry


def _in_service(settings: Settings, reference: str = "unet@production") -> InService:
    service = InService(Published(settings))
    asyncio.run(service.use(reference))
    return service


def _number(service: InService) -> int:
    return service.describe().version.number


def _spoil(store: ObjectStore, number: int, name: str, change: Callable[[bytes], bytes], *, sign: bool) -> None:
    """Change one file of a version; `sign` makes the manifest agree, as a publisher's own fault would."""
    prefix = version_key("unet", number)
    data = change(store.get(f"{prefix}/{name}"))
    store.put(f"{prefix}/{name}", data)
    if sign:
        manifest = json.loads(store.get(f"{prefix}/{MANIFEST}"))
        folder = Path(str(store.uri)) / prefix
        fresh = make_manifest(folder, "model", manifest["meta"])
        store.put(f"{prefix}/{MANIFEST}", fresh.model_dump_json(indent=1).encode())


def _flipped(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def _negative(data: bytes) -> bytes:
    image = imaging.decode(data)
    return imaging.encode(imaging.Image((65535 - image.pixels).astype(np.uint16), "png", 65535))


def test_an_alias_that_moves_is_followed(settings: Settings, promoted: Registry) -> None:
    service = _in_service(settings)
    assert _number(service) == 1
    promoted.promote("unet@2")
    asyncio.run(service.look())
    assert _number(service) == 2
    promoted.rollback("unet")
    asyncio.run(service.look())
    assert _number(service) == 1


def test_a_version_that_is_in_place_is_not_loaded_again(settings: Settings, promoted: Registry) -> None:
    service = _in_service(settings)
    model = service.loaded.model
    asyncio.run(service.look())
    asyncio.run(service.use("unet@1"))
    assert service.loaded.model is model


@pytest.mark.parametrize(
    ("name", "change", "sign", "told"),
    [
        ("weights.safetensors", _flipped, False, "weights.safetensors"),
        (GOLDEN, _negative, True, "golden image"),
        ("config.yaml", lambda data: data.replace(b"base: 4", b"base: 8"), True, "unet@2"),
    ],
)
def test_a_bad_version_is_refused_visibly_and_the_old_one_goes_on(
    settings: Settings,
    store: LocalStore,
    promoted: Registry,
    name: str,
    change: Callable[[bytes], bytes],
    sign: bool,
    told: str,
) -> None:
    service = _in_service(settings)
    _spoil(store, 2, name, change, sign=sign)
    promoted.promote("unet@2")
    asyncio.run(service.look())
    serving = service.describe()
    assert serving.version.number == 1
    assert serving.refused is not None and told in serving.refused.detail
    promoted.rollback("unet")
    asyncio.run(service.look())
    assert service.describe().refused is None


def test_a_refused_version_is_not_loaded_again_and_again(
    settings: Settings, store: LocalStore, promoted: Registry
) -> None:
    loads: list[str] = []

    class Counting(Published):
        def load(self, version: Any) -> Any:
            loads.append(version.ref)
            return super().load(version)

    service = InService(Counting(settings))
    asyncio.run(service.use("unet@production"))
    _spoil(store, 2, GOLDEN, _negative, sign=True)
    promoted.promote("unet@2")
    for _ in range(3):
        asyncio.run(service.look())
    assert loads == ["unet@1", "unet@2"]
    assert service.describe().refused is not None


def test_a_replica_that_starts_while_the_alias_names_a_bad_version_serves_the_one_before(
    settings: Settings, store: LocalStore, promoted: Registry
) -> None:
    _spoil(store, 2, GOLDEN, _negative, sign=True)
    promoted.promote("unet@2")
    service = _in_service(settings)
    serving = service.describe()
    assert serving.version.number == 1 and serving.refused is not None


class Away(LocalStore):
    """A store that does not answer."""

    def get(self, key: str) -> bytes:
        raise StoreUnavailable("the store did not answer")

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        raise StoreUnavailable("the store did not answer")


def test_a_replica_starts_from_the_nodes_cache_when_the_store_is_away(
    settings: Settings, store: LocalStore, promoted: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _in_service(settings)
    monkeypatch.setattr("kintsugi_serve.replica.serving.open_store", lambda uri: Away(Path(uri)))
    again = _in_service(settings)
    assert again.describe().version == first.describe().version
    assert again.describe().refused is not None
    monkeypatch.undo()


def test_a_store_that_goes_away_leaves_the_model_in_service(
    settings: Settings, store: LocalStore, promoted: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = _in_service(settings)
    with monkeypatch.context() as gone:
        gone.setattr(LocalStore, "get_with_etag", Away.get_with_etag)
        asyncio.run(service.look())
        assert _number(service) == 1
        assert service.describe().refused is not None
    asyncio.run(service.look())
    assert service.describe().refused is None


def test_a_name_that_does_not_exist_is_an_error_only_where_nothing_serves(
    settings: Settings, promoted: Registry
) -> None:
    with pytest.raises(ModelNotFound):
        _in_service(settings, "unet@nowhere")
    service = _in_service(settings)
    asyncio.run(service.use("unet@9"))
    assert _number(service) == 1
    assert service.describe().refused is not None


def test_following_goes_on_until_it_is_cancelled(settings: Settings, promoted: Registry) -> None:
    async def followed() -> int:
        service = InService(Published(settings))
        await service.use("unet@production")
        task = asyncio.create_task(service.follow(0.01))
        promoted.promote("unet@2")
        while service.describe().version.number == 1:
            await asyncio.sleep(0.01)
        task.cancel()
        return service.describe().version.number

    assert asyncio.run(asyncio.wait_for(followed(), 60)) == 2


def test_another_model_is_loaded_once_by_the_version_that_its_name_means(
    settings: Settings, promoted: Registry
) -> None:
    asked: list[str] = []

    def shelving(load: Any) -> Any:
        async def get(reference: str) -> Any:
            asked.append(reference)
            return await load(reference)

        return get

    others = Others(Published(settings), shelving)
    loaded = asyncio.run(others.get("unet@production"))
    promoted.promote("unet@2")
    assert asyncio.run(others.get("unet@production")).version.number == 2
    assert loaded.version.number == 1
    assert asked == ["unet@1", "unet@2"]
