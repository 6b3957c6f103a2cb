"""Train with two workers on one host and on two, in turn, and compare images per second; needs root for its hosts.

    bench_hosts.py [--repeats 3] [--epochs 6]

Both kinds run on the same cluster, each worker with one thread; a host has two CPUs, so that two workers of one CPU
are on one, and workers of more than one CPU are not. The first epoch of a run, in which a host fetches the data, is
left out.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median

from cluster_hosts import ROOT, Cluster, cluster
from rows import Row, measured, output_of, print_table, write_rows

from kintsugi.data.synthetic import write_synthetic

CPUS = {"one host": 1.0, "two hosts": 1.2}
SETTINGS = ("train.workers=2", "train.threads=1", "train.steps_per_epoch=40", "train.validation_images=4")
RATE = re.compile(r"epoch .* ([0-9.]+) images/s")


def train(made: Cluster, kind: str, seed: int, epochs: int) -> list[float]:
    """Images per second of a run's epochs, validation included, as the run told them."""
    settings = (*SETTINGS, f"train.epochs={epochs}", f"train.cpus_per_worker={CPUS[kind]}", f"train.seed={seed}")
    sets = [part for value in settings for part in ("--set", value)]
    log = made.submit("train", str(ROOT / "platform/configs/demo.yaml"), "--name", "unet", *sets).stdout
    hosts = workers_hosts(made)
    if len(hosts) != list(CPUS).index(kind) + 1:
        raise SystemExit(f"the workers of a run for {kind} were on {hosts}")
    return [float(rate) for rate in RATE.findall(log)][1:]


def workers_hosts(made: Cluster) -> set[str]:
    """The nodes that the two workers which were begun last are or were on."""
    answer = json.loads(made.ask_dashboard("/api/v0/actors?detail=1&limit=10000"))
    actors = [actor for actor in answer["data"]["result"]["result"] if actor["class_name"] == "RayTrainWorker"]
    return {actor["node_id"] for actor in sorted(actors, key=lambda actor: actor["job_id"])[-2:]}


def rows(found: dict[str, list[float]]) -> list[Row]:
    medians = {kind: median(rates) for kind, rates in found.items()}
    note = "; ".join(f"{kind} {min(rates):.0f} to {max(rates):.0f}" for kind, rates in found.items())
    count = len(found["two hosts"])
    return [
        *(Row(f"images/s, two workers on {kind}, median of epochs", value, n=count) for kind, value in medians.items()),
        measured("two hosts / one host", medians["two hosts"] / medians["one host"], ">= 0.9", n=count, note=note),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    asked = parser.parse_args()
    # The hosts end with this process only if it ends in order.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    found: dict[str, list[float]] = {kind: [] for kind in CPUS}
    with tempfile.TemporaryDirectory(prefix="kh-") as scratch, cluster(Path(scratch) / "cluster", 2) as made:
        images = write_synthetic(Path(scratch) / "images", parts=40, size=192)
        made.kintsugi("data", "build", "pairs", str(images), "--name", "demo")
        for repeat in range(asked.repeats):
            for kind in CPUS:
                found[kind] += (rates := train(made, kind, repeat, asked.epochs))
                print(f"{kind}, run {repeat + 1}: {' '.join(f'{rate:.1f}' for rate in rates)}", flush=True)
    table = rows(found)
    print_table(table)
    write_rows(table, output_of("bench-hosts"))
    return 0 if all(row.holds is not False for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
