"""Nodes come with the work that waits for them, each from the group that is meant for it, and leave when idle."""

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

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[3]
LIMIT_S = 280.0
CONFIG = ROOT / "platform/configs/demo.yaml"
SMALL = [
    "model.base=8",
    "model.levels=2",
    "model.skips=[true,true]",
    "data.crop=48",
    "loss.weights.perceptual=0",
    "loss.weights.basic=0.3",
]
TRAIN = """
from functools import partial
from kintsugi import cli
from kintsugi.training import launch

def without_cuda(payload):
    from ray.air._internal import device_manager
    from kintsugi.training import launch
    device_manager._torch_device_manager = device_manager.CPUTorchDeviceManager()
    launch._worker_loop(payload)

launch._worker_loop = without_cuda
launch.NodeNetwork = partial(launch.NodeNetwork, backend="gloo")
raise SystemExit(cli.main())
"""
"""`kintsugi train`, whose workers hold GPUs that are not there: gloo for NCCL, and the model on the CPU."""


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
def trained(cluster: Any, store: LocalStore, endpoint: str) -> str:
    """What a training of two workers with a GPU each says; it begins while the endpoint waits for its node."""
    wanted = ["train.gpu=true", "train.workers=2", "train.cpus_per_worker=1", "train.max_failures=0"]
    small = ["train.epochs=1", "train.steps_per_epoch=2", "train.validation_images=2"]
    sets = [part for value in (*SMALL, *small, *wanted) for part in ("--set", value)]
    done = cluster.run(TRAIN, "train", str(CONFIG), "--name", "trained", *sets)
    assert done.returncode == 0, f"{done.stderr} {cluster.told()}"
    return done.stdout


@pytest.fixture(scope="module")
def endpoint(cluster: Any, store: LocalStore) -> str:
    """Of `serve/application.yaml` with two replicas of a GPU each, on which the model does not run."""
    (port,) = free_ports(1)
    config = yaml.safe_load((ROOT / "serve/application.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"model": "unet@1", "num_gpus": 1, "device": "cpu", "min_replicas": 2}
    cluster.deploy(config)
    return f"http://127.0.0.1:{port}"


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


def test_workers_with_gpus_add_nodes_of_the_train_group(cluster: Any, trained: str) -> None:
    assert "published trained@1" in trained
    assert cluster.placed("RayTrainWorker") == {"train": 2}
    assert cluster.ever()["train"] == 2


def test_replicas_with_gpus_add_nodes_of_the_serve_group_up_to_its_maximum(
    cluster: Any, endpoint: str, trained: str
) -> None:
    """Of two replicas one waits, since there may be one node; the ingress is beside the other."""
    assert wait_until(lambda: answers(f"{endpoint}/readyz"), LIMIT_S), cluster.told()
    image = imaging.encode(imaging.Image(np.full((32, 32), 90, np.uint8)))
    answer = httpx2.post(f"{endpoint}/v1/restore", content=image, timeout=60, trust_env=False)
    assert answer.status_code == 200
    assert cluster.groups["serve"]["max_workers"] == cluster.ever()["serve"] == 1
    assert cluster.placed("ServeReplica") == {"serve": 2, "nowhere": 1}


def test_idle_nodes_leave(cluster: Any, endpoint: str, trained: str) -> None:
    cluster.undeploy()
    assert wait_until(lambda: cluster.added() == {}, LIMIT_S), cluster.told()
    assert cluster.ever() == {"head": 1, "serve": 1, "train": 2}


def test_the_head_has_nothing_for_work(cluster: Any) -> None:
    (head,) = (node for node in cluster.nodes() if node["labels"]["kintsugi.io/role"] == "head")
    assert not {"CPU", "GPU"} & head["resources_total"].keys()
    assert cluster.ask("GET", "/api/v0/nodes", token=False).status_code == 401
