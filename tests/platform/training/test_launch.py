"""What the launcher tells of a run; that it runs on a cluster is shown in tests/e2e."""

import pytest

from kintsugi.config import ExperimentConfig
from kintsugi.data.dataset import SplitReader, open_split
from kintsugi.data.layouts import BadPair
from kintsugi.storage import LocalStore
from kintsugi.training import launch
from kintsugi.training.state import build_state


class FakeGauge:
    made: list["FakeGauge"]

    def __init__(self, name: str, about: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys, self.values = name, tag_keys, list[tuple[float, dict[str, str]]]()
        self.made.append(self)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags))


def test_figures_of_a_run_are_gauges_of_ray_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGauge.made = []
    monkeypatch.setattr(launch, "Gauge", FakeGauge)
    gauges = launch._Gauges("search/trials/7")
    for value in (1.0, 2.0):
        gauges.set({"loss/total": value, "train/gpu_memory_gb": 3.0, "learning_rate": 1e-4})
    told = {gauge.name: gauge.values[-1] for gauge in FakeGauge.made}
    tags = {"run": "search/trials/7"}
    assert told == {
        "kintsugi_train_loss_total": (2.0, tags),
        "kintsugi_train_gpu_memory_gb": (3.0, tags),
        "kintsugi_train_learning_rate": (1e-4, tags),
    }
    assert {gauge.tag_keys for gauge in FakeGauge.made} == {("run",)}


class Spoiled(SplitReader):
    """A split of which one row was bad in the store."""

    @property
    def skipped(self) -> tuple[BadPair, ...]:
        return (BadPair("wave03", "its clean image differs from the hash beside it"),)


def test_the_card_and_the_driver_are_told_what_was_skipped(
    tiny_store: LocalStore, tiny_config: ExperimentConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    train, val = open_split(tiny_store, "tiny", "train"), open_split(tiny_store, "tiny", "val")
    spoiled, state = Spoiled(train.source), build_state(tiny_config, train.digest)
    card = launch.card(tiny_config, spoiled, val, 2, state, commit="abc")
    why = "its clean image differs from the hash beside it"
    assert card["skipped"] == {"train": [{"name": "wave03", "reason": why}], "val": []}
    assert card["commit"] == "abc" and "torch" in card["versions"]
    launch._tell_skipped(spoiled, val)
    assert capfd.readouterr().err == f"1 bad train images are skipped (wave03: {why})\n"
