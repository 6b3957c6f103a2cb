import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "ray_cluster.yaml"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text())


@pytest.fixture(scope="module")
def prepared(config: dict[str, Any]) -> dict[str, Any]:
    return prepare_config(copy.deepcopy(config))


def test_ray_accepts_the_cluster_file(prepared: dict[str, Any]) -> None:
    validate_config(prepared)


def test_ray_would_refuse_a_misspelt_key(prepared: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config({**prepared, "max_wrokers": 3})


def test_workers_scale_from_none_and_carry_gpus(prepared: dict[str, Any]) -> None:
    workers = {n: t for n, t in prepared["available_node_types"].items() if n != prepared["head_node_type"]}
    assert all(t["min_workers"] == 0 and t["max_workers"] > 0 and t["resources"]["GPU"] > 0 for t in workers.values())
    assert workers
    assert prepared["available_node_types"][prepared["head_node_type"]]["max_workers"] == 0


def test_no_port_is_opened_beyond_ssh(prepared: dict[str, Any]) -> None:
    assert "IpPermissions" not in prepared["provider"].get("security_group", {})
    starts = prepared["head_start_ray_commands"] + prepared["worker_start_ray_commands"]
    assert not any("0.0.0.0" in command for command in starts)


def test_every_ray_start_demands_the_token_that_is_copied_to_the_nodes(prepared: dict[str, Any]) -> None:
    starts = prepared["head_start_ray_commands"] + prepared["worker_start_ray_commands"]
    assert sum("ray start" in command for command in starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "~/.ray/auth_token" in prepared["file_mounts"]


def test_nothing_of_rays_defaults_is_installed_beside_the_lock(prepared: dict[str, Any]) -> None:
    commands = prepared["head_setup_commands"] + prepared["worker_setup_commands"]
    assert any("make -C ~/kintsugi install" in command for command in commands)
    assert not any("pip install" in command for command in commands)


def test_the_head_listens_on_the_port_that_workers_dial(config: dict[str, Any]) -> None:
    assert "--port=6379" in config["head_start_ray_commands"][-1]
    assert "--address=$RAY_HEAD_IP:6379" in config["worker_start_ray_commands"][-1]
