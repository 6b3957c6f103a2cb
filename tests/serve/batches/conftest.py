from pathlib import Path

import numpy as np
import pytest

from kintsugi import imaging
from kintsugi.storage import LocalStore
from kintsugi_serve.batches.batch import make_batch
from kintsugi_serve.batches.records import Records
from kintsugi_serve.jobs import LoadedModel

MODEL = LoadedModel("unet", 3, "d" * 64)


def _image(width: int) -> bytes:
    return imaging.encode(imaging.Image(np.full((32, width), 100, np.uint8)))


@pytest.fixture
def raw(tmp_path: Path) -> LocalStore:
    """Images a/40.png to a/49.png."""
    raw = LocalStore(tmp_path / "raw")
    for width in range(40, 50):
        raw.put(f"a/{width}.png", _image(width))
    return raw


@pytest.fixture
def clean(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "clean")


@pytest.fixture
def records(store: LocalStore, raw: LocalStore, clean: LocalStore) -> Records:
    records = Records(store, make_batch(store.uri, "local", raw.uri, clean.uri, MODEL))
    records.save()
    return records
