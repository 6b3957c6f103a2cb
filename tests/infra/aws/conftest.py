"""Infra for AWS against moto, which answers as AWS does and holds what was made. Nothing leaves this machine."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws import config as bootstrap
from ray.autoscaler._private.aws import utils

ROOT = Path(__file__).parents[3]
REGION = "us-west-2"
ASKED = ["--store", "s3://inspection/kintsugi", "--ssh-from", "203.0.113.0/24"]


@pytest.fixture(scope="session")
def creator() -> ModuleType:
    """infra/aws/create.py."""
    spec = importlib.util.spec_from_file_location("create", ROOT / "infra/aws/create.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cluster_file() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


@contextlib.contextmanager
def account(home: Path) -> Iterator[None]:
    """An empty account with its default VPC, and a home without keys."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(home))
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        for cached in (utils.resource_cache, utils.client_cache, bootstrap._get_subnets_or_die):
            cached.cache_clear()
        yield


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[None]:
    """An account for one test. moto has one for a process: not beside `booted`."""
    with account(tmp_path):
        yield


@dataclass(frozen=True)
class Booted:
    """What `ray up` made of the cluster file, after infra/aws/create.py and before the first machine."""

    config: dict[str, Any]
    home: Path

    @property
    def kinds(self) -> dict[str, Any]:
        return self.config["available_node_types"]


@pytest.fixture(scope="module")
def booted(
    creator: ModuleType, cluster_file: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Booted]:
    home = tmp_path_factory.mktemp("home")
    with account(home):
        assert creator.main(ASKED) == 0
        yield Booted(commands._bootstrap_config(cluster_file, no_config_cache=True), home)


Rule = tuple[str, int, int, list[str]]


@pytest.fixture
def outside() -> Callable[[], list[Rule]]:
    """The rules of the cluster's security group that let anyone in but its own members: protocol, ports, networks."""
    return lambda: _outside(security_group())


@pytest.fixture
def group() -> Callable[[], dict[str, Any]]:
    return security_group


def security_group() -> dict[str, Any]:
    named = [{"Name": "group-name", "Values": ["kintsugi"]}]
    (found,) = boto3.client("ec2", REGION).describe_security_groups(Filters=named)["SecurityGroups"]
    return found


def _outside(group: dict[str, Any]) -> list[Rule]:
    members = [{"UserId": group["OwnerId"], "GroupId": group["GroupId"]}]
    rules = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"] != members]
    return [
        (rule["IpProtocol"], rule["FromPort"], rule["ToPort"], [one["CidrIp"] for one in rule["IpRanges"]])
        for rule in rules
    ]
