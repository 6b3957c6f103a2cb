"""infra/aws/create.py: what it makes, makes again, and refuses."""

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import boto3
import pytest
from ray.autoscaler._private.aws import config as bootstrap
from ray.autoscaler._private.util import prepare_config

REGION = "us-west-2"
STORE = "s3://inspection/kintsugi"
HOME_NETWORK = "203.0.113.0/24"
MORE = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]})


@pytest.mark.usefixtures("aws")
def test_ray_up_alone_opens_port_22_and_no_other(
    cluster_file: dict[str, Any], outside: Callable[[], list[Any]]
) -> None:
    bootstrap.bootstrap_aws(prepare_config(cluster_file))
    assert outside() == [("tcp", 22, 22, ["0.0.0.0/0"])]


@pytest.mark.usefixtures("aws")
def test_the_roles_hold_the_committed_policies_and_nothing_else(creator: ModuleType) -> None:
    assert creator.main(["--store", STORE, "--ssh-from", HOME_NETWORK]) == 0
    iam = boto3.client("iam")
    for kind, policies in creator.POLICIES.items():
        role = f"kintsugi-{kind}"
        assert iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"] == []
        assert sorted(iam.list_role_policies(RoleName=role)["PolicyNames"]) == sorted(policies)
        held = iam.get_role_policy(RoleName=role, PolicyName="store-policy")["PolicyDocument"]
        assert "arn:aws:s3:::inspection/kintsugi/models/*" in json.dumps(held)
        assert [
            r["RoleName"] for r in iam.get_instance_profile(InstanceProfileName=role)["InstanceProfile"]["Roles"]
        ] == [role]


@pytest.mark.usefixtures("aws")
def test_a_second_run_of_create_brings_everything_back_to_what_is_committed(
    creator: ModuleType, group: Callable[[], dict[str, Any]], outside: Callable[[], list[Any]]
) -> None:
    assert creator.main(["--store", STORE, "--ssh-from", HOME_NETWORK]) == 0
    iam, ec2 = boto3.client("iam"), boto3.client("ec2", REGION)
    iam.put_role_policy(RoleName="kintsugi-worker", PolicyName="store-policy-2", PolicyDocument=MORE)
    ec2.authorize_security_group_ingress(
        GroupId=group()["GroupId"], CidrIp="0.0.0.0/0", IpProtocol="tcp", FromPort=8265, ToPort=8265
    )
    assert creator.main(["--store", STORE, "--ssh-from", "198.51.100.7"]) == 0
    assert outside() == [("tcp", 22, 22, ["198.51.100.7/32"])]
    assert iam.list_role_policies(RoleName="kintsugi-worker")["PolicyNames"] == ["store-policy"]


@pytest.mark.usefixtures("aws")
def test_create_asks_which_vpc_where_ray_could_take_either(
    creator: ModuleType, capsys: pytest.CaptureFixture[str], group: Callable[[], dict[str, Any]]
) -> None:
    ec2 = boto3.client("ec2", REGION)
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.1.0/24")["Subnet"]["SubnetId"]
    ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    assert creator.main(["--store", STORE, "--ssh-from", HOME_NETWORK]) == 1
    assert "2 VPCs have public subnets: name one with --vpc" in capsys.readouterr().err
    assert creator.main(["--store", STORE, "--ssh-from", HOME_NETWORK, "--vpc", vpc]) == 0
    assert group()["VpcId"] == vpc


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--store", STORE], "--ssh-from"),
        (["--ssh-from", HOME_NETWORK], "set KINTSUGI_STORE"),
        (["--store", "s3://inspection/*", "--ssh-from", HOME_NETWORK], "set KINTSUGI_STORE"),
        (["--store", STORE, "--ssh-from", "anywhere"], "anywhere"),
    ],
)
@pytest.mark.usefixtures("aws")
def test_create_says_what_is_missing(
    creator: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], remedy: str
) -> None:
    assert creator.main(arguments) == 1
    assert remedy in capsys.readouterr().err
