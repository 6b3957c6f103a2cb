"""Join the Ray cluster that the environment names."""

import logging
import os
import sys

from kintsugi.errors import StackError


def connect(*, worker_output: bool = True) -> None:
    """Join the cluster at RAY_ADDRESS, once a process; `worker_output` shows here what workers write.

    Raises:
        StackError: no address is set, or nothing answers there.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise StackError("no Ray cluster is known: run 'kintsugi up', or set RAY_ADDRESS to a cluster's address")
    # Not at the top: Ray reads its token settings when it is imported, and the local stack's come just before this.
    import ray

    try:
        ray.init(address=address, ignore_reinit_error=True, logging_level=logging.ERROR, log_to_driver=worker_output)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StackError(
            f"no Ray cluster answers at {address}, or it refuses the token ({error}): run 'kintsugi status'"
        ) from error


def leave() -> None:
    """Leave the cluster; nothing where this process never joined one. What runs there goes on."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
