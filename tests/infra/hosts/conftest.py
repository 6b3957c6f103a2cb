"""A Ray cluster over hosts made of namespaces; see `tests/benchmarks/cluster_hosts.py`."""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kintsugi.data.synthetic import write_synthetic
from kintsugi.processes import wait_until

TESTS = Path(__file__).parents[2]
CONFIG = str(TESTS.parent / "platform/configs/demo.yaml")
SMALL = (
    *("data.crop=48", "model.base=8", "train.steps_per_epoch=10", "train.validation_images=6", "train.epochs=2"),
    *("search.trials=2", "search.screened=1", "search.epochs=2", "search.screen_epochs=1"),
    # A host has two CPUs: two such workers do not fit on one, and what is left is for the endpoint.
    *("train.workers=2", "train.cpus_per_worker=1.2"),
)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head, two workers of two CPUs each, a store, a user and a stranger, each on a host of its own."""
    missing = [name for name in ("ip", "nft", "redis-server") if not shutil.which(name)]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"hosts are made of namespaces by root; missing: {missing or 'root'} (make test-cluster)")
    sys.path.append(str(TESTS / "benchmarks"))
    with importlib.import_module("cluster_hosts").cluster(tmp_path_factory.mktemp("hosts"), 2) as made:
        yield made


@pytest.fixture(scope="session")
def verb(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The words of `train` or `tune`, small; `settings` of the configuration, `options` as they are."""

    space = tmp_path_factory.mktemp("space") / "space.yaml"
    space.write_text("parameters:\n  model.dropout: {uniform: [0.0, 0.3]}\n")

    def words(name: str, *settings: str, options: Sequence[str] = ()) -> list[str]:
        what = {"train": [CONFIG], "tune": [str(space), "--config", CONFIG]}[name]
        sets = [part for value in (*SMALL, *settings) for part in ("--set", value)]
        return [name, *what, "--name", "unet", *sets, *options]

    return words


@pytest.fixture(scope="session")
def dataset(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_synthetic(tmp_path_factory.mktemp("images"), parts=20, size=96)
    cluster.kintsugi("data", "build", "pairs", str(folder), "--name", "demo")


@pytest.fixture(scope="session")
def trained(cluster: Any, verb: Callable[..., list[str]], dataset: None) -> dict[str, Any]:
    """The card of a model that a job trained across two hosts."""
    return cluster.card(cluster.submit(*verb("train")).stdout)


@pytest.fixture(scope="session")
def key(cluster: Any, trained: object, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key of an endpoint of two replicas that a job put up, and that listens on every node."""
    made = json.loads(cluster.kintsugi("serve", "key", "line-3", "--json").stdout)
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(f"keys:\n  - tenant: line-3\n    sha256: {made['sha256']}\n")
    options = ["--min-replicas", "2", "--set", "num_cpus=0.3", "--set", "ingress_num_cpus=0.1"]
    # A version of its own: what is published later answers with other bytes.
    options += ["--set", "ingress_replicas=2", "--model", "unet@1"]
    cluster.submit("serve", "--host", "0.0.0.0", "--every-node", "--keys", str(keys), *options)
    return made["key"]


@pytest.fixture
def images(cluster: Any, key: str, tmp_path: Path) -> Any:
    """One who calls the endpoint on both workers; `[n]` waits for so many images, `end()` for the counts."""

    class Images:
        def __init__(self) -> None:
            self.until, self.progress = tmp_path / "until", tmp_path / "progress"
            self.log = tmp_path / "caller.log"
            files = (str(self.until), str(self.progress))
            command = [sys.executable, str(cluster.caller), "1000", *files, *map(cluster.endpoint, ("one", "two"))]
            self.process = cluster.hosts["user"].start(command, self.log, {**cluster.variables, "KINTSUGI_KEY": key})

        def sent(self) -> int:
            return int(self.progress.read_text() or 0) if self.progress.exists() else 0

        def wait_for(self, more: int) -> None:
            wanted = self.sent() + more
            assert wait_until(lambda: self.sent() >= wanted, 300), self.log.read_text()

        def end(self) -> dict[str, int]:
            self.until.touch()
            assert self.process.wait(600) == 0, self.log.read_text()
            return json.loads(self.log.read_text().splitlines()[-1])

    return Images()
