import copy
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.scripts.scripts import start

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "ray_cluster.yaml"
ROLES = {"head": "on-demand", "cpu": "on-demand", "train": "spot", "serve": "on-demand"}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text())


@pytest.fixture(scope="module")
def prepared(config: dict[str, Any]) -> dict[str, Any]:
    return prepare_config(copy.deepcopy(config))


@pytest.fixture(scope="module")
def starts(prepared: dict[str, Any]) -> dict[str, str]:
    """The commands that start Ray, of the head and of a worker."""
    lists = {"head": prepared["head_start_ray_commands"], "worker": prepared["worker_start_ray_commands"]}
    return {kind: command for kind, commands in lists.items() for command in commands if "ray start" in command}


def test_ray_accepts_the_cluster_file(prepared: dict[str, Any]) -> None:
    validate_config(prepared)


def test_ray_would_refuse_a_misspelt_key(prepared: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config({**prepared, "max_wrokers": 3})


def test_the_head_runs_no_work(prepared: dict[str, Any]) -> None:
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0


def test_every_group_of_workers_scales_from_none(prepared: dict[str, Any]) -> None:
    workers = {n: t for n, t in prepared["available_node_types"].items() if n != prepared["head_node_type"]}
    assert workers.keys() == {"cpu", "train", "serve"}
    assert all(kind["min_workers"] == 0 and kind["max_workers"] > 0 for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) == prepared["max_workers"]
    assert {name for name, kind in workers.items() if kind["resources"].get("GPU")} == {"train", "serve"}


def test_only_training_runs_on_machines_that_may_be_taken_back(config: dict[str, Any]) -> None:
    kinds = config["available_node_types"]
    assert {name for name, kind in kinds.items() if "InstanceMarketOptions" in kind["node_config"]} == {"train"}


@pytest.mark.parametrize("kind", ROLES)
def test_a_node_gets_the_labels_of_its_group(
    config: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = config["available_node_types"][kind]["labels"]
    apart = {"ray-subcluster": "serve"} if kind == "serve" else {}
    assert labels == {"kintsugi.io/role": kind, "ray.io/market-type": ROLES[kind], **apart}
    monkeypatch.setenv("RAY_OVERRIDE_LABELS", json.dumps(labels))
    spec = ResourceAndLabelSpec(num_cpus=1, num_gpus=0, memory=2**30, object_store_memory=2**30, resources={})
    spec.resolve(is_head=False, node_ip_address="127.0.0.1")
    assert spec.labels is not None and labels.items() <= spec.labels.items()


def test_the_autoscaler_reads_labels_and_idle_times(prepared: dict[str, Any]) -> None:
    kinds = AutoscalingConfig(copy.deepcopy(prepared), skip_content_hash=True).get_node_type_configs()
    assert {name: kind.labels["kintsugi.io/role"] for name, kind in kinds.items()} == {kind: kind for kind in ROLES}
    assert kinds["train"].idle_timeout_s == 300


def test_every_disk_is_encrypted_and_goes_with_its_machine(config: dict[str, Any]) -> None:
    for kind in config["available_node_types"].values():
        (disk,) = kind["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"]
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_nothing_listens_beyond_the_security_group(prepared: dict[str, Any], starts: dict[str, str]) -> None:
    assert "IpPermissions" not in prepared["provider"]["security_group"]
    assert "--dashboard-host=127.0.0.1" in starts["head"]
    assert not any("0.0.0.0" in command for command in starts.values())


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_start_knows_every_flag(starts: dict[str, str], kind: str) -> None:
    flags = shlex.split(starts[kind].partition("ray start ")[2])
    # As it parses a command line, without running anything.
    assert start.make_context("start", flags).params["metrics_export_port"] == 8080
    with pytest.raises(Exception, match="No such option"):
        start.make_context("start", [*flags, "--dashbord-host=127.0.0.1"])


def test_the_head_listens_on_the_port_that_workers_dial(starts: dict[str, str]) -> None:
    assert "--port=6379" in starts["head"] and "--autoscaling-config=~/ray_bootstrap_config.yaml" in starts["head"]
    assert "--address=$RAY_HEAD_IP:6379" in starts["worker"]


def test_every_ray_start_demands_the_token_that_is_copied_to_the_nodes(
    prepared: dict[str, Any], starts: dict[str, str], tmp_path: Path
) -> None:
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert prepared["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"
    (tmp_path / "kintsugi").mkdir()
    shutil.copy(ROOT / prepared["file_mounts"]["~/kintsugi/cluster.env"], tmp_path / "kintsugi")
    for command in starts.values():
        asked = re.sub(r"ulimit -n 65536; \S+ray start .*", "env", command, flags=re.DOTALL)
        done = subprocess.run(
            ["bash", "-c", asked], env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        given = done.stdout.splitlines()
        assert {"RAY_AUTH_MODE=token", "KINTSUGI_STORE=s3://your-bucket/kintsugi"} <= set(given)
        assert any(line.startswith(f"PATH={tmp_path}/kintsugi/venv/bin:") for line in given)


def test_a_node_is_given_the_wheel_and_the_lock_and_nothing_of_rays_defaults(prepared: dict[str, Any]) -> None:
    assert prepared["setup_commands"][1:] == ["bash ~/kintsugi/install-node"]
    assert prepared["head_setup_commands"][2:] == prepared["worker_setup_commands"][2:] == []
    brought = {local for local in prepared["file_mounts"].values() if not local.startswith("~")}
    assert brought == {
        "dist",
        "requirements.lock",
        "pyproject.toml",
        "infra/aws/cluster.env",
        "infra/aws/install-node",
    }
    assert all((ROOT / local).is_file() for local in brought - {"dist"})


@pytest.mark.parametrize("wheels", [0, 2])
def test_a_node_refuses_to_guess_which_wheel_is_meant(tmp_path: Path, wheels: int) -> None:
    shutil.copy(ROOT / "infra/aws/install-node", tmp_path)
    (tmp_path / "dist").mkdir()
    for number in range(wheels):
        (tmp_path / f"dist/kintsugi-0.{number}-py3-none-any.whl").touch()
    done = subprocess.run(["bash", tmp_path / "install-node"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {wheels} wheels in dist, not one: run 'make wheel'")


def test_the_environment_names_the_region_of_the_cluster(config: dict[str, Any]) -> None:
    lines = (ROOT / "infra/aws/cluster.env").read_text().splitlines()
    assert f"AWS_DEFAULT_REGION={config['provider']['region']}" in lines
