"""Make what ray_cluster.yaml names in an AWS account: two roles with policies and instance profiles, a security group.

    python infra/aws/create.py --ssh-from 203.0.113.7/32
    python infra/aws/create.py --print

Run it with the credentials of an administrator, again after every change of ray_cluster.yaml or infra/aws: what exists
is brought to the state described here. `--print` shows the documents instead, for Terraform or a review.
"""

import argparse
import ipaddress
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import boto3
import yaml
from botocore.exceptions import ClientError

HERE = Path(__file__).parent
CLUSTER_FILE = HERE.parents[1] / "ray_cluster.yaml"
POLICIES = {"head": ("head-policy", "store-policy"), "worker": ("store-policy",)}
STORE = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<keys>[^*?$/][^*?$]*?))?/*")


class Unusable(Exception):
    """One sentence that says what to do."""


@dataclass(frozen=True)
class Cluster:
    """What the cluster file and its environment say of the account's part."""

    name: str
    region: str
    group: str
    bucket: str
    keys: str
    worker_types: tuple[str, ...]


def read_cluster(file: Path, store: str) -> Cluster:
    """Raises `Unusable` for an address of a store that no policy could be written for."""
    found = STORE.fullmatch(store)
    if found is None or found["bucket"] == "your-bucket":
        raise Unusable(f"set KINTSUGI_STORE in {HERE / 'cluster.env'} to s3://BUCKET/PREFIX (it is {store})")
    config = yaml.safe_load(file.read_text())
    kinds = config["available_node_types"]
    types = {kind["node_config"]["InstanceType"] for name, kind in kinds.items() if name != config["head_node_type"]}
    return Cluster(
        name=config["cluster_name"],
        region=config["provider"]["region"],
        group=config["provider"]["security_group"]["GroupName"],
        bucket=found["bucket"],
        keys=f"{found['keys']}/" if found["keys"] else "",
        worker_types=tuple(sorted(types)),
    )


def read_store(file: Path) -> str:
    return dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)["KINTSUGI_STORE"]


def document(name: str, cluster: Cluster, account: str) -> dict[str, Any]:
    """A document of this folder with the cluster's names put in."""
    names = {"Account": account, "Region": cluster.region, "Cluster": cluster.name, "Bucket": cluster.bucket}
    types = '", "'.join(cluster.worker_types)
    text = (HERE / f"{name}.json").read_text()
    return json.loads(Template(text).substitute(names, Keys=cluster.keys, WorkerTypes=types))


def make_role(iam: Any, cluster: Cluster, account: str, kind: str) -> str:
    """The role and the instance profile of the same name, with these policies and no other of their own."""
    name = f"{cluster.name}-{kind}"
    trust = json.dumps(document("trust", cluster, account))
    unless(("EntityAlreadyExists",), lambda: iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust))
    iam.update_assume_role_policy(RoleName=name, PolicyDocument=trust)
    for policy in POLICIES[kind]:
        text = json.dumps(document(policy, cluster, account))
        iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=text)
    for policy in set(iam.list_role_policies(RoleName=name)["PolicyNames"]) - set(POLICIES[kind]):
        iam.delete_role_policy(RoleName=name, PolicyName=policy)
    unless(("EntityAlreadyExists",), lambda: iam.create_instance_profile(InstanceProfileName=name))
    unless(("LimitExceeded",), lambda: iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name))
    return name


def make_group(ec2: Any, cluster: Cluster, vpc: str, sources: list[str]) -> str:
    """The security group: SSH from `sources`, everything between its members, nothing else."""
    where = [{"Name": "vpc-id", "Values": [vpc]}, {"Name": "group-name", "Values": [cluster.group]}]
    tags = [{"Key": "ray-cluster-name", "Value": cluster.name}]
    found = ec2.describe_security_groups(Filters=where)["SecurityGroups"]
    if found:
        group = found[0]["GroupId"]
    else:
        about = "SSH from outside, everything inside"
        group = ec2.create_security_group(GroupName=cluster.group, VpcId=vpc, Description=about)["GroupId"]
    ec2.create_tags(Resources=[group], Tags=tags)
    inside = [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}]
    outside = [rule for one in found for rule in one["IpPermissions"] if not rule.get("UserIdGroupPairs")]
    # A running cluster keeps its own traffic meanwhile.
    unless(
        ("InvalidPermission.Duplicate",),
        lambda: ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=inside),
    )
    if outside:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=outside)
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh(sources)])
    return group


def ssh(sources: list[str]) -> dict[str, Any]:
    networks = [ipaddress.ip_network(source) for source in sources]
    return {
        "IpProtocol": "tcp",
        "FromPort": 22,
        "ToPort": 22,
        "IpRanges": [{"CidrIp": str(one)} for one in networks if one.version == 4],
        "Ipv6Ranges": [{"CidrIpv6": str(one)} for one in networks if one.version == 6],
    }


def find_vpc(ec2: Any, vpc: str | None) -> str:
    """The VPC in which Ray will look for the group: `vpc`, else the only one with public subnets."""
    public = [{"Name": "map-public-ip-on-launch", "Values": ["true"]}]
    usable = {subnet["VpcId"] for subnet in ec2.describe_subnets(Filters=public)["Subnets"]}
    if vpc is None and len(usable) != 1:
        raise Unusable(
            f"{len(usable)} VPCs have public subnets: name one with --vpc, and its subnets as SubnetIds of each node"
        )
    return vpc or usable.pop()


def unless(codes: tuple[str, ...], call: Callable[[], object]) -> None:
    try:
        call()
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") not in codes:
            raise


def create(cluster: Cluster, sources: list[str], vpc: str | None) -> list[str]:
    """Everything, in the account of the credentials; what was made, a line each."""
    session = boto3.Session(region_name=cluster.region)
    account = session.client("sts").get_caller_identity()["Account"]
    iam, ec2 = session.client("iam"), session.client("ec2")
    place = find_vpc(ec2, vpc)
    # The head asks for spot machines, and may not make the role that Amazon's own service takes for that.
    taken = ("InvalidInput", "EntityAlreadyExists")
    unless(taken, lambda: iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com"))
    roles = [f"role and instance profile {make_role(iam, cluster, account, kind)}" for kind in POLICIES]
    return [*roles, f"security group {cluster.group} ({make_group(ec2, cluster, place, sources)}) in {place}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ssh-from", action="append", default=[], metavar="CIDR", help="who may reach port 22")
    parser.add_argument("--vpc", help="the VPC of the nodes, where more than one has public subnets")
    parser.add_argument("--store", help="s3://BUCKET/PREFIX, instead of KINTSUGI_STORE in infra/aws/cluster.env")
    parser.add_argument("--print", action="store_true", help="show the documents and change nothing")
    asked = parser.parse_args(arguments)
    try:
        cluster = read_cluster(CLUSTER_FILE, asked.store or read_store(HERE / "cluster.env"))
        if asked.print:
            names = ("trust", "head-policy", "store-policy")
            print(json.dumps({name: document(name, cluster, "123456789012") for name in names}, indent=2))
            return 0
        if not asked.ssh_from:
            raise Unusable("say who may reach port 22: --ssh-from 203.0.113.7/32, once for each network")
        print("\n".join(create(cluster, asked.ssh_from, asked.vpc)))
    except (Unusable, ValueError, ClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
