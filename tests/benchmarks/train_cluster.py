"""A Ray cluster of its own for a benchmark, on this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ray.cluster_utils import Cluster

from kintsugi.processes import free_ports


@contextmanager
def ray_head(num_cpus: int) -> Iterator[Cluster]:
    """A head with a dashboard, without which Ray Train asks in vain for the state of its own actors all the time."""
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray's workers give way to all other processes, so that a busy machine makes minutes of every start.
    os.environ |= {"RAY_worker_niceness": "0"}
    head = {"num_cpus": num_cpus, "include_dashboard": True, "dashboard_port": free_ports(1)[0]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()
