"""Where the verbs find things: the store, its models, a checkpoint by whatever name it goes."""

from pathlib import Path
from typing import TYPE_CHECKING

from kintsugi import doors, local
from kintsugi.errors import ConfigError, ModelNotFound, StoreError
from kintsugi.storage import ObjectStore, open_store, store_uri_from_environment

if TYPE_CHECKING:
    from kintsugi.registry import ModelVersion


def open_root_store() -> ObjectStore:
    """The store that KINTSUGI_STORE names, else the local stack's.

    Raises:
        ConfigError: none is named, or it is reached by plain HTTP beyond loopback.
    """
    local.activate(local.home_folder())
    store = open_store(store_uri_from_environment())
    doors.check_transport(store)
    return store


def fetch_model(store: ObjectStore, model: str) -> "tuple[ModelVersion, Path]":
    from kintsugi.registry import Registry

    registry = Registry(store)
    version = registry.resolve(model)
    return version, registry.fetch(version)


def find_model(model: str | None) -> tuple[str, str, Path]:
    """Name, digest and checkpoint folder of a folder, of a published model, or of the shipped weights."""
    from kintsugi.checkpoint import load_checkpoint
    from kintsugi.restore.restorer import shipped_weights

    folder = shipped_weights() if model is None else Path(model)
    if folder.is_dir():
        return folder.name if model is None else str(folder), load_checkpoint(folder).digest, folder
    assert model is not None
    try:
        version, folder = fetch_model(open_root_store(), model)
    except (ConfigError, ModelNotFound, StoreError) as error:
        raise ModelNotFound(f"{model} is no checkpoint folder, and no published model either: {error}") from error
    return version.ref, version.digest, folder
