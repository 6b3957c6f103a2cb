"""`ray up`, walked as far as it goes without a machine: the account, what it asks for, what it tells the head."""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

ROOT = Path(__file__).parents[3]
REGION = "us-west-2"


def test_ray_up_keeps_the_security_group_that_lets_in_ssh_from_our_network_only(
    booted: Any, group: Callable[[], dict[str, Any]], outside: Callable[[], list[Any]]
) -> None:
    assert outside() == [("tcp", 22, 22, ["203.0.113.0/24"])]
    assert all(kind["node_config"]["SecurityGroupIds"] == [group()["GroupId"]] for kind in booted.kinds.values())


def test_ray_up_makes_a_key_pair_and_no_role_of_its_own(booted: Any) -> None:
    key = Path(booted.config["auth"]["ssh_private_key"])
    assert key.parent == booted.home / ".ssh" and key.stat().st_mode & 0o777 == 0o600
    assert [pair["KeyName"] for pair in boto3.client("ec2", REGION).describe_key_pairs()["KeyPairs"]] == [key.stem]
    roles = {role["RoleName"] for role in boto3.client("iam").list_roles()["Roles"]}
    assert {name for name in roles if not name.startswith("AWSServiceRole")} == {"kintsugi-head", "kintsugi-worker"}


def test_every_kind_of_machine_exists_with_the_resources_that_the_file_declares(booted: Any) -> None:
    ec2 = boto3.client("ec2", REGION)
    for name, kind in booted.kinds.items():
        answer = ec2.describe_instance_types(InstanceTypes=[kind["node_config"]["InstanceType"]])
        (machine,) = answer["InstanceTypes"]
        gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
        cpus = machine["VCpuInfo"]["DefaultVCpus"]
        assert kind["resources"]["CPU"] == (0 if name == "head" else cpus)
        assert kind["resources"].get("GPU", 0) == gpus


@pytest.mark.parametrize(
    ("kind", "profile", "market"),
    [
        ("head", "kintsugi-head", None),
        ("cpu", "kintsugi-worker", None),
        ("train", "kintsugi-worker", "spot"),
        ("serve", "kintsugi-worker", None),
    ],
)
def test_a_machine_starts_with_its_role_market_and_tag(
    booted: Any, kind: str, profile: str, market: str | None
) -> None:
    provider = AWSNodeProvider(booted.config["provider"], booted.config["cluster_name"])
    node = copy.deepcopy(booted.kinds[kind]["node_config"])
    (machine,) = provider.create_node(node, {"ray-user-node-type": kind}, 1).values()
    assert machine.iam_instance_profile["Arn"].endswith(f":instance-profile/{profile}")
    assert machine.instance_lifecycle == market
    assert {"Key": "ray-cluster-name", "Value": "kintsugi"} in machine.tags
    assert provider.non_terminated_nodes({"ray-user-node-type": kind}) == [machine.id]
    provider.terminate_node(machine.id)
    assert provider.non_terminated_nodes({"ray-user-node-type": kind}) == []


def test_the_head_may_make_every_call_that_rays_node_provider_makes(booted: Any) -> None:
    provider = AWSNodeProvider(booted.config["provider"], booted.config["cluster_name"])
    called: set[str] = set()
    for resource in (provider.ec2, provider.ec2_fail_fast):
        events = resource.meta.client.meta.events
        events.register("before-call.ec2.*", lambda model, **_: called.add(f"ec2:{model.name}"))
    (machine,) = provider.create_node(dict(booted.kinds["train"]["node_config"]), {"ray-node-kind": "worker"}, 1)
    assert provider.non_terminated_nodes({"ray-node-kind": "worker"}) == [machine]
    provider.set_node_tags(machine, {"ray-node-status": "up-to-date"})
    provider.terminate_nodes([machine])
    assert called == {"ec2:RunInstances", "ec2:CreateTags", "ec2:DescribeInstances", "ec2:TerminateInstances"}
    held = json.loads((ROOT / "infra/aws/head-policy.json").read_text())["Statement"]
    assert called <= {action for statement in held for action in statement["Action"]}


class Shell:
    """Takes the place of `subprocess`: every machine answers, and what it was told is remembered."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def check_call(self, command: list[str], **_: Any) -> int:
        self.told.append(" ".join(command))
        return 0

    def check_output(self, command: list[str], **_: Any) -> bytes:
        self.check_call(command)
        return b"up"


def test_ray_up_brings_the_head_everything_it_starts_from(booted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace(booted.home, booted.config["file_mounts"]))
    shell = Shell()
    commands.get_or_create_head_node(booted.config, "ray_cluster.yaml", False, False, True, None, _runner=shell)  # pyright: ignore[reportArgumentType]
    told = [command.replace("'\"'\"'", "'") for command in shell.told]
    for brought in ("dist/", "requirements.lock", "pyproject.toml", "cluster.env", "install-node", ".ray/auth_token"):
        assert any("rsync" in command and brought in command for command in told), brought
    (start,) = [command for command in told if "ray start --head" in command]
    assert '"kintsugi.io/role":"head"' in start and '"CPU":0' in start
    assert next(i for i, c in enumerate(told) if "bash ~/kintsugi/install-node" in c) < told.index(start)


def workplace(folder: Path, mounts: dict[str, str]) -> Path:
    """A checkout in which `make wheel` and `ray get-auth-token --generate` were run; its home is `folder`."""
    (folder / ".ray").mkdir()
    (folder / ".ray/auth_token").write_text("token")
    place = folder / "checkout"
    for name in ("dist/kintsugi-0.1.0-py3-none-any.whl", *mounts.values()):
        if not name.startswith("~") and not (place / name).is_dir():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(IsADirectoryError):
                (place / name).write_text(name)
    return place
