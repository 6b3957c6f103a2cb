"""What the policies of infra/aws allow: read by the rules of IAM for the few operators that they use."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import pytest
from botocore.session import get_session

from kintsugi_serve.objects.places import RESERVED

ACCOUNT = "123456789012"
EC2 = f"arn:aws:ec2:us-west-2:{ACCOUNT}"
BUCKET = "arn:aws:s3:::inspection"
OURS, THEIRS = {"aws:ResourceTag/ray-cluster-name": "kintsugi"}, {"aws:ResourceTag/ray-cluster-name": "another"}
LAUNCH = {
    "aws:RequestTag/ray-cluster-name": "kintsugi",
    "ec2:InstanceType": "g6.2xlarge",
    "ec2:MetadataHttpTokens": "required",
    "ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/kintsugi-worker",
}


@pytest.fixture(scope="module")
def policies(creator: ModuleType) -> dict[str, list[dict[str, Any]]]:
    """The statements that each role holds."""
    cluster = creator.read_cluster(creator.CLUSTER_FILE, "s3://inspection/kintsugi")
    return {
        role: [one for name in names for one in creator.document(name, cluster, ACCOUNT)["Statement"]]
        for role, names in creator.POLICIES.items()
    }


def several(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def holds(operator: str, wanted: dict[str, Any], context: dict[str, str]) -> bool:
    optional = operator.endswith("IfExists")
    match = {"StringEquals": str.__eq__, "ArnEquals": str.__eq__, "StringLike": fnmatchcase}[
        operator.removesuffix("IfExists")
    ]
    return all(
        any(match(context[key], value) for value in several(values)) if key in context else optional
        for key, values in wanted.items()
    )


def allows(
    statements: Iterable[dict[str, Any]], action: str, resource: str, context: dict[str, str] | None = None
) -> bool:
    return any(
        action in several(one["Action"])
        and any(fnmatchcase(resource, wanted) for wanted in several(one["Resource"]))
        and all(holds(operator, wanted, context or {}) for operator, wanted in one.get("Condition", {}).items())
        for one in statements
    )


def test_no_statement_allows_every_action_or_everything_without_a_condition(
    policies: dict[str, list[dict[str, Any]]],
) -> None:
    for statement in (one for statements in policies.values() for one in statements):
        assert statement["Effect"] == "Allow" and {"NotAction", "NotResource"}.isdisjoint(statement)
        assert not any("*" in action for action in several(statement["Action"]))
        assert "*" not in several(statement["Resource"]) or statement["Condition"]


def test_every_action_is_one_that_amazon_knows(policies: dict[str, list[dict[str, Any]]]) -> None:
    # Actions that no call is named after, from the reference of IAM.
    known = {"iam:PassRole", "s3:ListBucket", "s3:ListMultipartUploadParts"}
    for service in ("ec2", "s3", "ssm"):
        known |= {f"{service}:{name}" for name in get_session().get_service_model(service).operation_names}
    assert {action for held in policies.values() for one in held for action in several(one["Action"])} <= known


def test_the_head_ends_and_tags_machines_of_its_own_cluster_only(policies: dict[str, list[dict[str, Any]]]) -> None:
    for action in ("ec2:TerminateInstances", "ec2:CreateTags"):
        assert allows(policies["head"], action, f"{EC2}:instance/i-1", OURS)
        assert not allows(policies["head"], action, f"{EC2}:instance/i-1", THEIRS)
        assert not allows(policies["head"], action, f"{EC2}:instance/i-1")
    assert not allows(policies["head"], "ec2:TerminateInstances", f"arn:aws:ec2:eu-west-1:{ACCOUNT}:instance/i-1", OURS)


def test_the_head_starts_workers_of_the_cluster_file(policies: dict[str, list[dict[str, Any]]]) -> None:
    assert allows(policies["head"], "ec2:RunInstances", f"{EC2}:instance/*", LAUNCH)
    assert allows(policies["head"], "ec2:RunInstances", f"{EC2}:security-group/sg-1", OURS)
    assert allows(policies["head"], "ec2:RunInstances", "arn:aws:ec2:us-west-2::image/ami-1", {"ec2:Owner": "amazon"})
    assert all(
        allows(policies["head"], "ec2:RunInstances", f"{EC2}:{kind}/one")
        for kind in ("subnet", "volume", "network-interface", "key-pair", "spot-instances-request")
    )


@pytest.mark.parametrize(
    "other",
    [
        {"ec2:InstanceType": "p5.48xlarge"},
        {"ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/kintsugi-head"},
        {"ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/administrator"},
        {"ec2:MetadataHttpTokens": "optional"},
        {"aws:RequestTag/ray-cluster-name": "another"},
    ],
)
def test_the_head_starts_no_other_machine(policies: dict[str, list[dict[str, Any]]], other: dict[str, str]) -> None:
    assert not allows(policies["head"], "ec2:RunInstances", f"{EC2}:instance/*", LAUNCH | other)


def test_the_head_passes_on_the_workers_role_only(policies: dict[str, list[dict[str, Any]]]) -> None:
    to_ec2, role = {"iam:PassedToService": "ec2.amazonaws.com"}, f"arn:aws:iam::{ACCOUNT}:role"
    assert allows(policies["head"], "iam:PassRole", f"{role}/kintsugi-worker", to_ec2)
    assert not allows(policies["head"], "iam:PassRole", f"{role}/kintsugi-head", to_ec2)
    assert not allows(
        policies["head"], "iam:PassRole", f"{role}/kintsugi-worker", {"iam:PassedToService": "lambda.amazonaws.com"}
    )


def test_workers_know_the_store_and_nothing_else(policies: dict[str, list[dict[str, Any]]]) -> None:
    assert {action.split(":")[0] for one in policies["worker"] for action in several(one["Action"])} == {"s3"}


@pytest.mark.parametrize("role", ["head", "worker"])
@pytest.mark.parametrize("area", RESERVED)
def test_every_area_of_the_store_is_read_and_written(
    policies: dict[str, list[dict[str, Any]]], role: str, area: str
) -> None:
    for action in ("s3:GetObject", "s3:PutObject"):
        assert allows(policies[role], action, f"{BUCKET}/kintsugi/{area}/x/y")
        assert not allows(policies[role], action, f"{BUCKET}/other/{area}/x/y")
        assert not allows(policies[role], action, f"arn:aws:s3:::another/kintsugi/{area}/x/y")
    assert allows(policies[role], "s3:ListBucket", BUCKET, {"s3:prefix": f"kintsugi/{area}/"})


@pytest.mark.parametrize("role", ["head", "worker"])
def test_no_machine_deletes_models_data_or_results(policies: dict[str, list[dict[str, Any]]], role: str) -> None:
    deleted = {area for area in RESERVED if allows(policies[role], "s3:DeleteObject", f"{BUCKET}/kintsugi/{area}/x/y")}
    assert deleted == {"runs", "batches"}
    assert not allows(policies[role], "s3:ListBucket", BUCKET, {"s3:prefix": "other/"})


def test_a_store_without_a_prefix_has_its_areas_at_the_top_of_the_bucket(creator: ModuleType) -> None:
    cluster = creator.read_cluster(creator.CLUSTER_FILE, "s3://inspection")
    held = creator.document("store-policy", cluster, ACCOUNT)["Statement"]
    assert allows(held, "s3:PutObject", f"{BUCKET}/models/x")
    assert not allows(held, "s3:PutObject", f"{BUCKET}/kintsugi/models/x")
