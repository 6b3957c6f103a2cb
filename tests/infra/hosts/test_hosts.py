"""A user on one host, a cluster on three others, a store on yet another: nothing is shared but the network."""

import json
from pathlib import Path
from typing import Any

import pytest

from kintsugi.data.synthetic import write_synthetic

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

CONFIG = str(Path(__file__).parents[3] / "platform/configs/demo.yaml")
SMALL = (
    "data.crop=48", "model.base=8", "train.steps_per_epoch=10", "train.validation_images=6", "train.epochs=2",
    "train.workers=2", "train.cpus_per_worker=1",
)  # fmt: skip


def train(*more: str) -> list[str]:
    sets = [part for value in (*SMALL, *more) for part in ("--set", value)]
    return ["train", CONFIG, "--name", "unet", *sets]


def card(cluster: Any, model: str) -> dict[str, Any]:
    return json.loads(cluster.kintsugi("models", "show", model, "--json").stdout)["card"]


@pytest.fixture(scope="module")
def dataset(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_synthetic(tmp_path_factory.mktemp("images"), parts=20, size=96)
    cluster.kintsugi("data", "build", "pairs", str(folder), "--name", "demo")


def test_a_job_from_another_host_trains_across_two_hosts(cluster: Any, dataset: None) -> None:
    """Each has one CPU, and the head none: the two workers cannot be on one of them."""
    done = cluster.submit(*train("train.seed=1"))
    assert "published unet@1" in done.stdout
    assert card(cluster, "unet@1")["workers"] == [{"epoch": 0, "step": 0, "world_size": 2}]
