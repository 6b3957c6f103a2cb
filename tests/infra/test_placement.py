"""Which groups of the clusters take a worker of a training, and which a replica of the endpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._raylet import node_labels_match_selector
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    ResourceRequestPriority,
    _AutoscalingCoordinatorActor,
)
from ray.train._internal.autoscaling_coordinator_client import build_train_resource_request
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from kintsugi.config import ExperimentConfig, with_values
from kintsugi.training import launch
from kintsugi_serve import app

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra/kuberay/base"
TRAINING, SERVING = launch._NODES, app.NODES


@pytest.fixture
def groups() -> dict[str, Any]:
    """Of `ray_cluster.yaml`, but for the head."""
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def takers(groups: Mapping[str, Any], selector: Mapping[str, str], *resources: str) -> set[str]:
    """The groups whose nodes match, as Ray's own scheduler matches them, and have each of `resources`."""
    able = {name: kind for name, kind in groups.items() if set(resources) <= kind["resources"].keys()}
    return {name for name, kind in able.items() if node_labels_match_selector(kind["labels"], selector)}


def test_each_group_with_gpus_takes_only_what_it_is_for(groups: dict[str, Any]) -> None:
    assert takers(groups, TRAINING, "GPU") == {"train"}
    assert takers(groups, SERVING, "GPU") == {"serve"}


def test_the_group_without_gpus_takes_both(groups: dict[str, Any]) -> None:
    assert takers(groups, TRAINING) == {"cpu", "train"}
    assert takers(groups, SERVING) == {"cpu", "serve"}


@pytest.mark.parametrize("selector", [TRAINING, SERVING])
def test_a_node_without_the_label_takes_both(selector: dict[str, str]) -> None:
    assert node_labels_match_selector({"ray.io/market-type": "spot"}, selector)


def test_the_clusters_on_kubernetes_have_groups_for_what_runs_there() -> None:
    training = yaml.safe_load((KUBERAY / "cluster.yaml").read_text())["spec"]
    serving = yaml.safe_load((KUBERAY / "service.yaml").read_text())["spec"]["rayClusterConfig"]
    for cluster, selector, expected in ((training, TRAINING, {"cpu", "train"}), (serving, SERVING, {"serve"})):
        groups = {group["groupName"]: {"resources": {}, **group} for group in cluster["workerGroupSpecs"]}
        assert takers(groups, selector) == expected


@pytest.mark.parametrize("fewest", [None, 1])
def test_every_worker_asks_for_such_a_node_elastic_or_not(fewest: int | None) -> None:
    config = with_values(ExperimentConfig(), {"train.workers": 4, "train.min_workers": fewest, "train.gpu": True})
    _, asked = build_train_resource_request(launch._scaling(config), 4)
    assert asked == [TRAINING] * 4


def test_an_elastic_training_counts_no_gpu_of_the_endpoint(groups: dict[str, Any]) -> None:
    """Ray counts what nodes have, in use or not, and by no label but the one of sub-clusters."""
    config = with_values(ExperimentConfig(), {"train.workers": 4, "train.min_workers": 1, "train.gpu": True})
    scaling = launch._scaling(config)
    nodes = [
        {"NodeID": name, "Alive": True, "Labels": kind["labels"], "Resources": kind["resources"]}
        for name, kind in groups.items()
    ]
    ray = _AutoscalingCoordinatorActor(send_resources_request=lambda *_, **__: None, get_cluster_nodes=lambda: nodes)
    bundles, selectors = build_train_resource_request(scaling, 4)
    high = ResourceRequestPriority.HIGH
    ray.request_resources("run", bundles, expire_after_s=60, priority=high, label_selectors=selectors)
    reserved = ray.get_reserved_resources("run")
    assert reserved.keys() == {"train"}
    assert ElasticScalingPolicy(scaling)._count_possible_workers(reserved) == 1
