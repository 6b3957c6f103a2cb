"""What Ray Tune adds to trainings that could be launched one after another: the same configs, both ways, in turn.

usage: tune_overhead.py ADDRESS STORE NAME CONFIG SPACE ANSWER
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import ray

from kintsugi.config import load_config
from kintsugi.storage import open_store
from kintsugi.training.launch import launch_training
from kintsugi_tune.ledger import Ledger, Plan, save_plan, trial_config
from kintsugi_tune.search import run_search
from kintsugi_tune.space import load_space


def main(address: str, store_uri: str, name: str, config: str, space: str, answer: str) -> None:
    handed = {variable: os.environ[variable] for variable in ("PYTHONPATH", "KINTSUGI_CACHE")}
    ray.init(address, runtime_env={"env_vars": handed}, logging_level=logging.ERROR, log_to_driver=False)
    store = open_store(store_uri)
    plan = Plan(name, load_config(config), load_space(Path(space)))
    save_plan(store, plan)
    ledger = Ledger(store, plan, owner=True)
    begun = time.monotonic()
    run_search(ledger, store_uri, max_concurrent=1, budget_minutes=None)
    searched = time.monotonic() - begun
    direct: list[float] = []
    for trial in ledger.record().trials:
        begun = time.monotonic()
        launch_training(
            trial_config(plan, trial.values, plan.config.search.epochs), store_uri, f"{name}-direct-{trial.number}"
        )
        direct.append(time.monotonic() - begun)
    Path(answer).write_text(json.dumps({"searched": searched, "direct": direct}))


if __name__ == "__main__":
    main(*sys.argv[1:])
