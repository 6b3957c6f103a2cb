"""A Ray cluster over hosts made of namespaces; see `tests/benchmarks/cluster_hosts.py`."""

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head, two workers of one CPU each, a store, a user and a stranger, each on a host of its own."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("hosts are made of namespaces by root with 'ip' (Debian: iproute2)")
    sys.path.append(str(BENCHMARKS))
    with importlib.import_module("cluster_hosts").cluster(tmp_path_factory.mktemp("hosts")) as made:
        yield made
