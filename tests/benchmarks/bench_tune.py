"""make bench-tune: what a search finds for what it costs, and what is left of one whose processes are killed.

FOLDER is as for bench-quality. Searches of the shipped space for a small model are compared with random search, without
Ray: the same number of epochs, the same known points first, the same seeds. Then, on a Ray cluster of this machine,
what Tune adds to the trainings that it runs, and a search whose driver, workers and nodes are killed.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from chaos_tune import SPACE, kill_search, prepare
from rows import Row, measured, output_of, print_table, write_rows
from train_cluster import farm, finish
from tune_efficiency import METHODS, Outcome, base_config, halved, search

from kintsugi.config import with_values
from kintsugi.data.dataset import build_dataset
from kintsugi.storage import LocalStore

Part = Callable[[argparse.Namespace], list[Row]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench-tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of tiles; without it, only what needs none")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=16, help="full trials that a search may cost")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=output_of("bench-tune"))
    options = parser.parse_args(arguments)
    rows = [row for part in options.only for row in PARTS[part](options)]
    print_table(rows)
    write_rows(rows, options.output)
    return int(any(row.holds is False for row in rows))


# ------------------------------------------------------------------------ efficiency


def efficiency(options: argparse.Namespace) -> list[Row]:
    if options.folder is None:
        return [Row("hypervolume, of that of random search", None, note="not measured: give a folder of tiles")]
    with tempfile.TemporaryDirectory(prefix="kintsugi-bench-") as scratch:
        store = LocalStore(Path(scratch) / "store")
        store.root.mkdir()
        built = build_dataset("pairs", options.folder, "tiles", store)
        os.environ["KINTSUGI_CACHE"] = str(Path(scratch) / "cache")
        epochs = options.trials * base_config(store.uri, built.ref).search.epochs
        jobs = [(method, seed, store.uri, built.ref, epochs) for seed in range(options.seeds) for method in METHODS]
        with ProcessPoolExecutor(2) as pool:
            found = list(pool.map(search, *zip(*jobs, strict=True)))
    by_seed = [({o.method: o for o in found if o.seed == seed}) for seed in range(options.seeds)]
    pairs = [(outcomes["random"], outcomes["ours"]) for outcomes in by_seed]
    steps = found[0].record.config.train.steps_per_epoch
    note = f"{epochs} epochs of {steps} steps each, what {options.trials} full trials cost"
    return [_hypervolumes(pairs, note), *_times(pairs, note), *_halving(pairs)]


def _hypervolumes(pairs: Sequence[tuple[Outcome, Outcome]], note: str) -> Row:
    random, ours = (mean(outcome.progress[-1].hypervolume for outcome in side) for side in zip(*pairs, strict=True))
    told = ", ".join(f"{a.progress[-1].hypervolume:.2f} and {b.progress[-1].hypervolume:.2f}" for a, b in pairs)
    return measured(
        "hypervolume, of that of random search", ours / random, ">= 1.25", n=len(pairs),
        note=f"above the degraded images, dB², means of {len(pairs)} seeds (random and ours: {told}); {note}",
    )  # fmt: skip


def _times(pairs: Sequence[tuple[Outcome, Outcome]], note: str) -> list[Row]:
    """Epochs until the recipe's score is reached by another trial, and random search's final score."""
    recipe = [(a.until(a.recipe), b.until(a.recipe)) for a, b in pairs]
    final = [(a.until(a.best), b.until(a.best)) for a, b in pairs]
    rows: list[Row] = []
    for what, times in (("the recipe's score is passed", recipe), ("random search's best score is reached", final)):
        told = ", ".join(f"{a or 'never'} and {b or 'never'}" for a, b in times)
        reached = [(a, b) for a, b in times if a and b]
        share = sum(b for _, b in reached) / sum(a for a, _ in reached) if len(reached) == len(times) else None
        figure = f"epochs until {what}, of those of random search"
        told = f"random and ours: {told}; {note}"
        rows.append(
            Row(figure, None, "", "<= 0.5", False, len(times), told)
            if share is None
            else measured(figure, share, "<= 0.5", n=len(times), note=told)
        )
    return rows


def _halving(pairs: Sequence[tuple[Outcome, Outcome]]) -> list[Row]:
    """Successive halving over the full curves of random search: which epochs it would not have run."""
    found = [halved(random.record) for random, _ in pairs]
    saved = 1 - sum(h.epochs for h in found) / sum(h.full_epochs for h in found)
    lost = max(h.best_of_all - h.winner for h in found)
    note = f"over the curves of {sum(h.trials for h in found)} random trials, each of which was trained in full"
    return [
        measured("epochs that successive halving saves", 100 * saved, ">= 50", unit="%", n=len(found), note=note),
        measured(
            "its winner's score below the best of all",
            lost,
            "<= 0",
            unit="dB",
            n=len(found),
            note="the largest of all seeds",
        ),
    ]


# -------------------------------------------------------------------------- with Ray


def overhead(options: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="kintsugi-bench-") as folder:
        scratch = Path(folder)
        store, config = prepare(scratch)
        values = {"train.steps_per_epoch": 300, "search.trials": 3, "search.screened": 0, "search.sampler": "random"}
        path, answer = scratch / "search.yaml", scratch / "answer.json"
        path.write_text(with_values(config, values).to_yaml())
        with farm(scratch) as made:
            words = (str(SPACE), str(answer))
            with made.driver(store.uri, "overhead", path, *words, script="tune_overhead.py") as process:
                finish(process, lambda: made.log("overhead"))
        seconds: dict[str, Any] = json.loads(answer.read_text())
    direct = sum(seconds["direct"])
    note = f"{len(seconds['direct'])} trials, {direct:.0f} s when launched one after another"
    share = 100 * (seconds["searched"] / direct - 1)
    return [measured("what Tune adds to its trials", share, "<= 10", unit="%", n=len(seconds["direct"]), note=note)]


def killed(options: argparse.Namespace) -> list[Row]:
    screened = max(1, options.kills // 3)
    trials = screened + max(2, options.kills // 2)
    with tempfile.TemporaryDirectory(prefix="kintsugi-bench-") as scratch:
        return kill_search(Path(scratch), options.kills, seed=0, trials=trials, screened=screened)


PARTS: dict[str, Part] = {"efficiency": efficiency, "overhead": overhead, "kills": killed}

if __name__ == "__main__":
    sys.exit(main())
