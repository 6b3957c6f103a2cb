import logging
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from kintsugi.errors import StoreUnavailable
from kintsugi.storage import MemoryStore
from kintsugi.training.curves import Curves


def read(store: MemoryStore, folder: Path) -> EventAccumulator:
    for info in store.list("runs/r/curves/"):
        store.download(info.key, folder / info.key.rpartition("/")[2])
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_curves_are_in_the_store_after_every_epoch(tmp_path: Path) -> None:
    store = MemoryStore()
    with Curves(store, "runs/r/curves") as curves:
        curves.log({"score": 1.0, "loss/total": 0.5}, 1)
        assert [event.value for event in read(store, tmp_path).Scalars("score")] == [1.0]
        curves.log({"score": 2.0, "loss/total": 0.25}, 2)
    found = read(store, tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("loss/total")] == [(1, 0.5), (2, 0.25)]


def test_settings_reach_the_hparams_table_of_a_run_that_never_ended(tmp_path: Path) -> None:
    store = MemoryStore()
    curves = Curves(store, "runs/r/curves", {"model.dropout": 0.15, "model.reduction": 16})
    curves.log({"score": 1.0}, 1)
    plugin = read(store, tmp_path).PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(plugin["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["model.dropout"].number_value == 0.15


def test_the_pictures_of_each_epoch_are_sent_once_at_native_resolution(tmp_path: Path) -> None:
    store = MemoryStore()
    images = [np.full((20, 30), level, np.float32) for level in (0.0, 0.5, 1.0)]
    with Curves(store, "runs/r/curves") as curves:
        curves.show([images, images], 1)
        sent = {info.key for info in store.list()}
        curves.log({"score": 1.0}, 1)
        curves.show([images], 2)
        curves.show([], 3)
    kept = [info.key for info in store.list("runs/r/curves/pictures/")]
    assert len(kept) == 2 and sent < set(kept)
    for key in kept:
        store.download(key, tmp_path / key.rpartition("/")[2])
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    assert [(i.step, i.width, i.height) for i in shown.Images("degraded, restored, clean")] == [
        (1, 98, 44),
        (2, 98, 20),
    ]


def test_curves_that_cannot_be_sent_follow_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Away(MemoryStore):
        away = True

        def put(self, *args: object, **how: object) -> None:
            if self.away:
                raise StoreUnavailable("the store is away")
            super().put(*args, **how)  # type: ignore[arg-type]

    store = Away()
    with Curves(store, "runs/r/curves") as curves, caplog.at_level(logging.WARNING):
        curves.log({"score": 1.0}, 1)
        assert "the store is away: the curves follow" in caplog.text
        store.away = False
        curves.log({"score": 2.0}, 2)
    assert [event.value for event in read(store, tmp_path).Scalars("score")] == [1.0, 2.0]
