"""A driver that can be killed: trains one run on a Ray cluster by address.

usage: train_driver.py ADDRESS STORE RUN CONFIG [RESIZE_SECONDS]
"""

import functools
import logging
import os
import sys

import ray
import train_trace

from kintsugi.config import load_config
from kintsugi.training import launch


def main(address: str, store: str, run: str, config: str, resize: str | None = None) -> None:
    handed = {name: os.environ[name] for name in (train_trace.VARIABLE, "PYTHONPATH", "KINTSUGI_CACHE")}
    ray.init(address, runtime_env={"env_vars": handed}, logging_level=logging.ERROR)
    launch._worker_loop = train_trace.worker_loop
    if resize is not None:
        # Ray looks for new nodes once a minute: too seldom for a run of minutes.
        launch.ScalingConfig = functools.partial(launch.ScalingConfig, elastic_resize_monitor_interval_s=float(resize))
    launch.launch_training(load_config(config), store, run)


if __name__ == "__main__":
    main(*sys.argv[1:])
