"""Join the Ray cluster that the environment names."""

import logging
import os
import sys

from kintsugi import doors
from kintsugi.errors import StackError


def connect(*, worker_output: bool = True, writes: bool = True) -> None:
    """Join the cluster at RAY_ADDRESS, once a process.

    Args:
        worker_output: show here what workers write.
        writes: the work will write to the store that KINTSUGI_STORE names, which is checked first.

    Raises:
        StackError: no address is set, nothing answers there, or a door is open that `kintsugi.doors` wants closed.
        ConfigError, StoreError: a door of the store is open (`doors.check_store`).
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise StackError("no Ray cluster is known: run 'kintsugi up', or set RAY_ADDRESS to a cluster's address")
    doors.check_token()
    if writes and (store := os.environ.get("KINTSUGI_STORE")):
        doors.check_store(store)
    # Not at the top: Ray reads its token settings when it is imported, and the local stack's come just before this.
    import ray

    joined_before = ray.is_initialized()
    try:
        context = ray.init(
            address=address, ignore_reinit_error=True, logging_level=logging.ERROR, log_to_driver=worker_output
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StackError(
            f"no Ray cluster answers at {address}, or it refuses the token ({error}): run 'kintsugi status'"
        ) from error
    try:
        doors.check_cluster(ray.get_runtime_context().gcs_address, context.dashboard_url or "")
    except StackError:
        if not joined_before:
            ray.shutdown()
        raise


def leave() -> None:
    """Leave the cluster; nothing where this process never joined one. What runs there goes on."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
