"""A user on one host, a cluster on three others, a store on yet another: nothing is shared but the network."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

METRICS = {8080, 44217, 44227}


def test_a_job_from_another_host_trains_across_two_hosts(trained: dict[str, Any]) -> None:
    """The head runs no work, and a host has no room for two of the workers."""
    assert trained["workers"] == [{"epoch": 0, "step": 0, "world_size": 2}]


def test_a_job_from_another_host_searches(cluster: Any, trained: object, verb: Callable[..., list[str]]) -> None:
    """Two trials at once, each with a host to itself."""
    cluster.submit(
        *verb("tune", "train.workers=1", options=("--search", "found", "--max-concurrent", "2")), timeout=900
    )
    found = json.loads(cluster.kintsugi("models", "list", "--json").stdout)
    assert {version["ref"] for version in found} == {"unet@1", "unet@2"}


def test_an_endpoint_on_every_node_answers_those_with_a_key(cluster: Any, key: str, tmp_path: Any) -> None:
    until, progress = tmp_path / "until", tmp_path / "progress"
    until.touch()
    for name in ("one", "two"):
        told = cluster.python(
            str(cluster.caller), "6", str(until), str(progress), cluster.endpoint(name), env={"KINTSUGI_KEY": key}
        )
        assert json.loads(told.stdout) == {"sent": 6, "failed": 0, "other_address": 0, "wrong": 0}
    refused = cluster.python(
        str(cluster.caller), "2", str(until), str(progress), cluster.endpoint("one"), env={"KINTSUGI_KEY": "kts_no"}
    )
    assert json.loads(refused.stdout)["failed"] == 2 and "401" in refused.stderr


@pytest.mark.usefixtures("key")
def test_no_port_of_the_cluster_takes_a_connection_of_a_stranger(cluster: Any) -> None:
    ports = cluster.open_ports()
    print(f"{len(ports)} ports that listen beyond loopback")
    assert len(ports) > 20
    assert cluster.told_to("stranger", ports) == {}


@pytest.mark.usefixtures("key")
def test_past_the_firewall_metrics_an_empty_page_and_the_endpoint_are_all_that_answers(cluster: Any) -> None:
    """Asked from a worker, which the firewall lets in, without its secrets."""
    told = cluster.told_to("one", cluster.open_ports())
    answers = {address: found for address, found in told.items() if found}
    print(f"{len(told)} of them take a connection of a worker, {len(answers)} answer: {answers}")
    assert len(told) > 20
    assert {int(address.rpartition(":")[2]) for address in answers} == {*METRICS, 8000, 8265}
    assert {tuple(found) for address, found in answers.items() if address.endswith(":8265")} == {("GET /",)}
