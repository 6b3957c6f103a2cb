"""A head dies, and a cable is out: what runs goes on by itself, and nobody who calls the endpoint notices."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kintsugi.processes import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ON_A_WORKER = ("--entrypoint-label", "kintsugi.io/role=cpu")


def begin(cluster: Any, run: str, words: list[str], placed: Sequence[str] = ()) -> None:
    """Start a training as a job, and wait for its first checkpoint."""
    cluster.kintsugi("submit", "--address", cluster.address, "--id", run, "--no-wait", *placed, "--", *words)
    seen = wait_until(lambda: cluster.manifests(f"runs/{run}/") > 0, 300)
    assert seen, cluster.kintsugi("jobs", "logs", run, "--address", cluster.address, check=False).stdout


def published(cluster: Any, run: str) -> dict[str, Any]:
    """The card of what the job published at its end."""
    done = cluster.kintsugi("jobs", "logs", run, "--address", cluster.address)
    return cluster.card(done.stdout)


def test_a_head_that_is_killed_and_started_again_is_missed_by_no_caller_and_no_training(
    cluster: Any, verb: Callable[..., list[str]], images: Any
) -> None:
    begin(cluster, "headless", verb("train", "train.epochs=10", options=("--run", "headless")), ON_A_WORKER)
    images.wait_for(50)
    cluster.kill("head")
    images.wait_for(200)
    cluster.start_ray("head")
    cluster.wait_for("head", "one", "two")
    card = published(cluster, "headless")
    images.wait_for(50)
    counts = images.end()
    print(counts)
    assert counts["sent"] >= 1000
    assert (counts["failed"], counts["wrong"]) == (0, 0), images.log.read_text()
    assert card["workers"][-1]["world_size"] == 2


@pytest.mark.usefixtures("dataset")
def test_a_training_goes_on_when_the_cable_of_a_host_was_out(cluster: Any, verb: Callable[..., list[str]]) -> None:
    """Ray gives the host up, and ends there when it hears of it; then it is started again, as the unit would."""
    settings = ("train.epochs=8", "train.max_failures=-1")
    begin(cluster, "cut", verb("train", *settings, options=("--run", "cut")))
    two = cluster.hosts["two"]
    with two.unplugged():
        assert wait_until(lambda: two.address not in cluster.alive(), 180), "the host was not given up"
    cluster.running["two"].wait(180)
    cluster.start_ray("two")
    cluster.wait_for("two")
    workers = published(cluster, "cut")["workers"]
    assert [start["world_size"] for start in workers] == [2, 2]
    assert workers[1]["epoch"] > 0
