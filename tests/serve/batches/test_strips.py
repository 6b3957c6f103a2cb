"""Images of a batch that are too large to be held."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kintsugi import imaging
from kintsugi.registry import ModelVersion
from kintsugi.restore.restorer import Restorer, RestoreSettings
from kintsugi.storage import LocalStore, sha256
from kintsugi_serve.batches import run as batch_run
from kintsugi_serve.batches.batch import Input
from kintsugi_serve.batches.records import Records
from kintsugi_serve.batches.run import Bench, restore_image
from kintsugi_serve.decoding.strips import Limits


@pytest.fixture
def strips_model(tmp_path: Path, publish: Callable[..., ModelVersion]) -> Restorer:
    publish(LocalStore(tmp_path / "models"), tmp_path / "checkpoint")
    return Restorer.from_checkpoint(tmp_path / "checkpoint", settings=RestoreSettings(tile=64, halo=16))


def _tiff(store: LocalStore, key: str, pixels: np.ndarray) -> bytes:
    store.put(key, imaging.encode(imaging.Image(pixels, "tiff", 255, (("compression", "none"),))))
    return store.get(key)


def _bench(records: Records, model: Any) -> Bench:
    plan = records.next_plan()
    assert plan is not None
    source, target = LocalStore(Path(records.batch.input)), LocalStore(Path(records.batch.output))
    return Bench(records, plan, model, source, target)


def _large(records: Records, model: Restorer, **limits: int) -> Bench:
    """A bench for which images of more than 2 kB are large."""
    return replace(_bench(records, model), max_bytes=2048, streamed=Limits(**limits))


def test_an_image_too_large_to_be_held_is_restored_in_strips(
    records: Records, raw: LocalStore, clean: LocalStore, strips_model: Restorer
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 60)).astype(np.uint8)
    data = _tiff(raw, "a/long.tif", pixels)
    bench, item = _large(records, strips_model), Input(0, "a/long.tif", len(data))
    first, again = restore_image(bench, item), restore_image(bench, item)
    assert (first.status, again.status) == ("restored", "kept")
    restored = clean.get("a/long.tif")
    assert first.input_sha256 == sha256(data) and first.output_sha256 == again.output_sha256 == sha256(restored)
    whole = strips_model.restore(imaging.decode(data))
    np.testing.assert_array_equal(imaging.decode(restored).pixels, whole.image.pixels)
    assert first.retention == round(whole.report.retention, 6)
    clean.put("a/long.tif", b"mine")
    assert restore_image(bench, item).code == "conflict" and clean.get("a/long.tif") == b"mine"


def test_a_large_image_that_cannot_be_restored_in_strips_is_a_line(
    records: Records, raw: LocalStore, strips_model: Restorer
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 60)).astype(np.uint8)
    raw.put("a/long.png", imaging.encode(imaging.Image(pixels)))
    size = len(_tiff(raw, "a/long.tif", pixels))
    asked: list[tuple[str, dict[str, int]]] = [
        ("a/long.png", {}),
        ("a/long.tif", {"max_pixels": 1000}),
        ("a/long.tif", {"max_pixels": 0}),
        ("a/long.tif", {"max_bytes": 1000}),
        ("a/none.tif", {}),
    ]
    found = [restore_image(_large(records, strips_model, **limits), Input(0, key, size)) for key, limits in asked]
    assert [line.status for line in found] == ["refused"] * 5
    assert [line.code for line in found] == ["too_large"] * 4 + ["missing"]
    assert "save it as TIFF" in str(found[0].detail)


def test_a_tiff_of_many_bytes_passes_in_strips_and_other_images_are_held(
    records: Records, raw: LocalStore, strips_model: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_run, "HELD_BYTES", 2048)
    pixels = np.random.default_rng(0).integers(0, 256, (400, 60)).astype(np.uint8)
    _tiff(raw, "a/long.tif", pixels)
    raw.put("a/long.png", imaging.encode(imaging.Image(pixels)))
    ways: list[str] = []

    class Told:
        def restore(self, image: imaging.Image) -> object:
            ways.append("whole")
            return strips_model.restore(image)

        def restore_strips(self, *words: object, **options: object) -> object:
            ways.append("strips")
            return strips_model.restore_strips(*words, **options)  # type: ignore[arg-type]

    bench = _bench(records, Told())
    for number, key in enumerate(("a/long.tif", "a/long.png")):
        assert restore_image(bench, Input(number, key, raw.size(key))).status == "restored"
    assert ways == ["strips", "whole"]
