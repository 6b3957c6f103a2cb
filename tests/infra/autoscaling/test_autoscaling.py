"""Nodes come with the work that waits for them, each from the group that is meant for it, and leave when idle."""

from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import yaml

from kintsugi import imaging
from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import load_config
from kintsugi.data.dataset import build_dataset
from kintsugi.data.synthetic import write_synthetic
from kintsugi.models import build_model
from kintsugi.processes import free_ports, wait_until
from kintsugi.registry import Registry
from kintsugi.storage import LocalStore

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[3]
LIMIT_S = 240.0
CONFIG = ROOT / "platform/configs/demo.yaml"
SMALL = ["model.base=8", "model.levels=2", "model.skips=[true,true]", "data.crop=48", "loss.weights.perceptual=0"]
TRAIN = """
from functools import partial
from ray.train.torch import TorchConfig
from kintsugi import cli
from kintsugi.training import launch
# NCCL, which Ray takes for workers with GPUs, does not start without CUDA.
launch.TorchTrainer = partial(launch.TorchTrainer, torch_config=TorchConfig(backend="gloo"))
cli.main()
"""


@pytest.fixture(scope="module")
def store(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """With the dataset `demo`, and an untrained model as `unet@1`."""
    store = LocalStore(cluster.store)
    build_dataset("pairs", write_synthetic(tmp_path_factory.mktemp("images"), parts=12, size=64), "demo", store)
    config = load_config(CONFIG, SMALL[:3])
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, build_model(config.model).eval(), config, {}, {})
    Registry(store).publish("unet", folder, b"{}")
    return store


@pytest.fixture(scope="module")
def endpoint(cluster: Any, store: LocalStore) -> str:
    """Of `serve/application.yaml`, with a GPU for its replica, on which the model does not run."""
    (port,) = free_ports(1)
    config = yaml.safe_load((ROOT / "serve/application.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"model": "unet@1", "num_gpus": 1, "device": "cpu", "max_replicas": 1}
    cluster.deploy(config)
    address = f"http://127.0.0.1:{port}"
    assert wait_until(lambda: answers(f"{address}/readyz"), LIMIT_S), cluster.told()
    return address


@pytest.fixture(scope="module")
def trained(cluster: Any, endpoint: str) -> str:
    """What a training of three workers with a GPU each says, of which two suffice."""
    wanted = ["train.gpu=true", "train.workers=3", "train.min_workers=2", "train.cpus_per_worker=1", "train.epochs=1"]
    small = [*SMALL, "train.steps_per_epoch=2", "train.validation_images=2"]
    sets = [part for value in (*small, *wanted) for part in ("--set", value)]
    driver = cluster.run(TRAIN, "train", str(CONFIG), "--name", "trained", "--run", "trained", *sets)
    said, _ = driver.communicate(timeout=LIMIT_S)
    assert driver.returncode == 0, said
    return said


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


def test_a_replica_with_a_gpu_adds_a_node_of_the_serve_group(cluster: Any, endpoint: str) -> None:
    assert cluster.added() == {"serve": 1}
    assert cluster.placed("Replica") == ["serve"]
    image = imaging.encode(imaging.Image(np.full((32, 32), 90, np.uint8)))
    answer = httpx2.post(f"{endpoint}/v1/restore", content=image, timeout=60, trust_env=False)
    assert answer.status_code == 200


def test_workers_with_gpus_add_nodes_of_the_train_group_up_to_its_maximum(
    cluster: Any, store: LocalStore, trained: str
) -> None:
    assert "published trained@1" in trained
    assert cluster.placed("RayTrainWorker") == ["train", "train"]
    assert cluster.ever() == {"head": 1, "serve": 1, "train": cluster.groups["train"]["max_workers"]}


def test_idle_nodes_leave(cluster: Any, trained: str) -> None:
    cluster.undeploy()
    assert wait_until(lambda: cluster.added() == Counter(), LIMIT_S), cluster.told()


def test_the_head_has_nothing_for_work(cluster: Any) -> None:
    (head,) = cluster.nodes()
    assert not {"CPU", "GPU"} & head["resources_total"].keys()
    assert cluster.ask("GET", "/api/v0/nodes", token=False).status_code == 401
