from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

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
