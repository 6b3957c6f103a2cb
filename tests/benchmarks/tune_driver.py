"""A driver that can be killed: begins a search, or goes on with it, on a Ray cluster by address.

usage: tune_driver.py ADDRESS STORE SEARCH CONFIG SPACE
"""

import logging
import os
import sys
from pathlib import Path

import ray

from kintsugi.config import load_config
from kintsugi.storage import open_store
from kintsugi_tune.ledger import Ledger, Plan, load_plan, save_plan
from kintsugi_tune.search import run_search
from kintsugi_tune.space import load_space


def main(address: str, store_uri: str, search: str, config: str, space: str) -> None:
    handed = {name: os.environ[name] for name in ("PYTHONPATH", "KINTSUGI_CACHE")}
    ray.init(address, runtime_env={"env_vars": handed}, logging_level=logging.ERROR)
    store = open_store(store_uri)
    if not store.exists(f"runs/{search}/search.json"):
        save_plan(store, Plan(search, load_config(config), load_space(Path(space))))
    plan = load_plan(store, search)
    limits = plan.config.search
    run_search(Ledger(store, plan, owner=True), store_uri, max_concurrent=limits.max_concurrent, budget_minutes=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
