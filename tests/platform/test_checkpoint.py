import json
import shutil
from pathlib import Path

import pytest
import torch

from kintsugi.checkpoint import (
    best_metrics,
    delete_torn,
    fetch_best,
    fetch_newest,
    load_checkpoint,
    load_model,
    load_train_state,
    newest_metrics,
    save_checkpoint,
)
from kintsugi.config import ExperimentConfig
from kintsugi.errors import IntegrityError, TrainingError
from kintsugi.manifest import make_manifest, put_folder
from kintsugi.models import RestorationUNet, build_model
from kintsugi.storage import MemoryStore


def saved(folder: Path, config: ExperimentConfig, score: float = 1.5, seed: int = 0, **more: float) -> RestorationUNet:
    torch.manual_seed(seed)
    model = build_model(config.model)
    save_checkpoint(
        folder, model, config, {"score": score, **more}, {"dataset_digest": "d"}, {"epoch": 3, "t": torch.ones(2)}
    )
    return model


def test_the_folder_alone_rebuilds_the_model(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    model = saved(tmp_path / "a", tiny_config)
    shutil.move(tmp_path / "a", tmp_path / "b")
    found = load_checkpoint(tmp_path / "b")
    image = torch.rand(1, 1, 32, 32)
    assert found.config == tiny_config
    assert (found.metrics, found.card) == ({"score": 1.5}, {"dataset_digest": "d"})
    assert torch.equal(load_model(found)(image).image, model.eval()(image).image)
    assert load_train_state(found)["epoch"] == 3


@pytest.mark.parametrize("name", ["weights.safetensors", "config.yaml", "metrics.json", "train_state.pt"])
def test_a_flipped_bit_in_any_file_is_refused(tmp_path: Path, tiny_config: ExperimentConfig, name: str) -> None:
    saved(tmp_path, tiny_config)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        load_checkpoint(tmp_path)


def test_a_folder_without_its_manifest_is_no_checkpoint(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    saved(tmp_path, tiny_config)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="no finished checkpoint"):
        load_checkpoint(tmp_path)


def test_fetch_best_takes_the_highest_score_and_falls_back_when_it_is_damaged(
    tmp_path: Path, tiny_config: ExperimentConfig
) -> None:
    store = MemoryStore()
    for epoch, score in enumerate((1.0, 3.0, 2.0)):
        folder = tmp_path / str(epoch)
        saved(folder, tiny_config, score, seed=epoch)
        put_folder(store, f"runs/r/checkpoint_{epoch}", folder, make_manifest(folder, "checkpoint"))
    assert fetch_best(store, "r", tmp_path / "best").metrics["score"] == 3.0
    store.put("runs/r/checkpoint_1/weights.safetensors", b"torn")
    assert fetch_best(store, "r", tmp_path / "next").metrics["score"] == 2.0


def test_fetch_newest_takes_the_last_epoch_that_is_whole(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    store = MemoryStore()
    assert fetch_newest(store, "r", tmp_path / "none") is None
    for epoch in (9, 10, 11):
        folder = tmp_path / str(epoch)
        saved(folder, tiny_config, score=-epoch, seed=epoch, epoch=epoch)
        put_folder(store, f"runs/r/checkpoint_{epoch}", folder, make_manifest(folder, "checkpoint"))
    assert fetch_newest(store, "r", tmp_path / "a") == "runs/r/checkpoint_11"
    # A worker that died while it uploaded: the manifest came, the weights did not.
    store.delete("runs/r/checkpoint_11/weights.safetensors")
    assert fetch_newest(store, "r", tmp_path / "b") == "runs/r/checkpoint_10"
    assert load_checkpoint(tmp_path / "b").metrics["epoch"] == 10


def test_a_checkpoint_whose_manifest_never_arrived_is_not_seen(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    store = MemoryStore()
    saved(tmp_path, tiny_config)
    for path in tmp_path.iterdir():
        if path.name != "manifest.json":
            store.put(f"runs/r/checkpoint_0/{path.name}", path)
    with pytest.raises(TrainingError, match="no whole checkpoint"):
        fetch_best(store, "r", tmp_path / "best")


def test_a_checkpoint_within_an_epoch_is_newer_than_the_end_of_the_one_before_and_never_the_best(
    tmp_path: Path, tiny_config: ExperimentConfig
) -> None:
    store = MemoryStore()
    figures = {"end-1": {"epoch": 1, "score": 1.0}, "early": {"epoch": 1, "step": 4}, "late": {"epoch": 1, "step": 12}}
    for name, metrics in figures.items():
        model = build_model(tiny_config.model)
        manifest = save_checkpoint(tmp_path / name, model, tiny_config, metrics, {})
        put_folder(store, f"runs/r/checkpoint_{name}", tmp_path / name, manifest)
    assert fetch_newest(store, "r", tmp_path / "a") == "runs/r/checkpoint_late"
    assert fetch_best(store, "r", tmp_path / "b").metrics == figures["end-1"]


def test_only_uploads_that_never_ended_are_deleted(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    store = MemoryStore()
    saved(tmp_path, tiny_config)
    put_folder(store, "runs/s/t/checkpoint_a", tmp_path, make_manifest(tmp_path, "checkpoint"))
    for key in ("runs/s/t/checkpoint_b/weights.safetensors", "runs/s/t/curves/events", "runs/s/u/checkpoint_c/x"):
        store.put(key, b"x")
    assert delete_torn(store, "s/t") == ["runs/s/t/checkpoint_b"]
    left = {info.key for info in store.list("runs/")}
    assert "runs/s/t/checkpoint_a/manifest.json" in left and "runs/s/t/curves/events" in left
    assert "runs/s/u/checkpoint_c/x" in left and not any("checkpoint_b" in key for key in left)


def told(store: MemoryStore, name: str, metrics: dict[str, float], *, whole: bool = True) -> None:
    store.put(f"runs/{name}/metrics.json", json.dumps(metrics).encode())
    if whole:
        store.put(f"runs/{name}/manifest.json", b"{}")


def test_a_runs_best_and_newest_metrics_are_read_without_its_weights() -> None:
    store = MemoryStore()
    for epoch, score in ((8, 1.0), (9, 3.0), (10, 2.0)):
        told(store, f"r/checkpoint_{epoch}", {"epoch": epoch, "score": score})
    told(store, "r/checkpoint_11", {"epoch": 11, "score": 9.0}, whole=False)
    told(store, "other/checkpoint_12", {"epoch": 12, "score": 9.0})
    assert best_metrics(store, "r") == {"epoch": 9, "score": 3.0}
    assert newest_metrics(store, "r") == {"epoch": 10, "score": 2.0}


def test_metrics_within_an_epoch_are_newer_than_its_start_and_never_the_best() -> None:
    store = MemoryStore()
    told(store, "r/checkpoint_b", {"epoch": 1, "score": -1.0})
    told(store, "r/checkpoint_a", {"epoch": 1, "step": 4})
    assert best_metrics(store, "r") == {"epoch": 1, "score": -1.0}
    assert newest_metrics(store, "r") == {"epoch": 1, "step": 4}


def test_a_run_without_a_whole_checkpoint_has_no_metrics() -> None:
    store = MemoryStore()
    told(store, "r/checkpoint_1", {"epoch": 1, "score": 1.0}, whole=False)
    assert newest_metrics(store, "r") is None
    with pytest.raises(TrainingError, match="run r has no whole checkpoint"):
        best_metrics(store, "r")
