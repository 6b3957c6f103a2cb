"""make chaos-train: what is left of a run whose processes are killed.

Training runs as it does in use, through `launch_training` on a Ray cluster of a head and two nodes of one worker each,
all on this machine. `--kills` SIGKILLs fall on a worker, a whole node and the driver in turn; the run must end with
the losses and the weights of one that nobody touched. Then a run loses a node, goes on with one worker, and gets the
node back; a node is drained; and writers of checkpoints are killed while they upload.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from chaos_writers import kill_writers
from rows import Row, measured, output_of, print_table, write_rows
from train_cluster import Farm, farm, finish, wait_until

from kintsugi.checkpoint import fetch_newest, load_checkpoint, load_train_state
from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.data.dataset import build_dataset, open_split
from kintsugi.data.synthetic import write_synthetic
from kintsugi.storage import LocalStore

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VALUES = {
    "data.dataset": "chaos", "data.crop": 32, "data.batch_size": 4, "data.loader_processes": 1,
    "degradation.use_given": False, "model.base": 8, "model.dropout": 0.1, "optim.ema": 0.9,
    "train.steps_per_epoch": None, "train.workers": 2, "train.checkpoint_steps": 3, "train.max_failures": -1,
    "train.validation_images": 4, "train.cpus_per_worker": 1,
    # The feature network is most of what a worker imports, and 20 kills are 20 starts.
    "loss.weights": {"defect": 0.35, "ssim": 0.4, "perceptual": 0, "edge": 0.15, "basic": 0.1},
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="chaos-train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in one run: worker, node, driver, worker, ...")
    parser.add_argument("--writers", type=int, default=100, help="writers of checkpoints to be killed")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=output_of("chaos-train"))
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="kintsugi-chaos-") as scratch:
        room = prepare(Path(scratch))
        for part in options.only:
            rows += PARTS[part](room, options)
    print_table(rows)
    write_rows(rows, options.output)
    return int(any(row.holds is False for row in rows))


@dataclass(frozen=True)
class Room:
    """A store with a small dataset, and the experiment that is run on it."""

    scratch: Path
    store: LocalStore
    config: ExperimentConfig
    images: int

    def variant(self, name: str, **values: Any) -> Path:
        """A config file with other values; dots in keys are written as two underscores."""
        path = self.scratch / f"{name}.yaml"
        changed = {key.replace("__", "."): value for key, value in values.items()}
        path.write_text(with_values(self.config, changed).to_yaml())
        return path


def prepare(scratch: Path) -> Room:
    store = LocalStore(scratch / "store")
    store.root.mkdir()
    build_dataset("pairs", write_synthetic(scratch / "images", parts=16, size=64), "chaos", store)
    config = with_values(load_config(ROOT / "platform/configs/demo.yaml"), VALUES)
    os.environ["KINTSUGI_CACHE"] = str(scratch / "cache")
    return Room(scratch, store, config, len(open_split(store, "chaos", "train")))


# ---------------------------------------------------------------------------- kills


def kills(room: Room, options: argparse.Namespace) -> list[Row]:
    steps = -(-room.images // room.config.data.batch_size)
    epochs = max(3, -(-(options.kills + 1) * 5 // steps))
    config = room.variant("kills", train__epochs=epochs)
    # A kill every 5 steps or so, with checkpoints every 3: some fall before, some on and some after one.
    dice = random.Random(options.seed)
    points = [5 * number + dice.randrange(3, 6) for number in range(options.kills)]
    with farm(room.scratch) as made:
        with made.driver(room.store.uri, "straight", config) as process:
            finish(process, lambda: made.log("straight"))
        done = _run_with_kills(made, room, config, points, steps)
    same, differ = _equal_ends(room, "straight", "killed")
    straight, killed = ([line["metrics"] for line in _last_epochs(made, run)] for run in ("straight", "killed"))
    lost = _lost_steps(made.lines("killed"), steps)
    seen = _coverage(made.lines("killed"))
    wrong = sum(count != {1} or len(ids) != room.images for ids, count in seen.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(done).items())
    note = f"{kinds} SIGKILLs in one run of {epochs} epochs of {steps} steps, 2 workers"
    return [
        measured("kills that hit a running process", len(done), f">= {options.kills}", n=options.kills, note=kinds),
        measured(
            "tensors that differ from the run nobody touched", differ, "== 0", n=same + differ,
            note=f"weights, averages and optimizer, bit for bit; {note}",
        ),
        measured(
            "epochs whose reported figures differ", sum(a != b for a, b in zip(straight, killed, strict=True)), "== 0",
            n=epochs, note="losses and validation figures, exactly",
        ),
        measured(
            "most steps done again after a kill", max(lost, default=0), f"<= {VALUES['train.checkpoint_steps']}",
            n=len(lost), note="a checkpoint every 3 steps and at the end of each epoch",
        ),
        measured("epochs in which a sample was missed or doubled", wrong, "== 0", n=len(seen), note="by sample id"),
    ]  # fmt: skip


def _run_with_kills(made: Farm, room: Room, config: Path, points: list[int], steps: int) -> list[str]:
    done: list[str] = []
    remaining = list(enumerate(points))
    while True:
        with made.driver(room.store.uri, "killed", config) as process:
            while remaining:
                number, point = remaining[0]
                wait_until(
                    lambda at=point, now=process: (
                        _progress(made.lines("killed"), steps) >= at or now.poll() is not None
                    ),
                    f"step {point}",
                    lambda: made.log("killed"),
                )
                if process.poll() is not None:
                    raise SystemExit(f"the driver ended by itself:\n{made.log('killed')}")
                remaining.pop(0)
                kind = ("worker", "node", "driver")[number % 3]
                done += [kind] * _KILLS[kind](made, process)
                if kind == "driver":
                    break
            else:
                finish(process, lambda: made.log("killed"))
                return done


def _progress(lines: Sequence[dict[str, Any]], steps: int) -> int:
    """Steps done by the processes that run now."""
    if not lines:
        return 0
    last = lines[-1]
    return last["epoch"] * steps + last["step"] + 1 if psutil.pid_exists(last["pid"]) else 0


def _kill_worker(made: Farm, process: "subprocess.Popen[bytes]") -> bool:
    """One of the two, whose last step is on record."""
    return _killed(made.lines("killed")[-1]["pid"])


def _kill_node(made: Farm, process: "subprocess.Popen[bytes]") -> bool:
    made.kill_node()
    made.add()
    return True


def _kill_driver(made: Farm, process: "subprocess.Popen[bytes]") -> bool:
    hit = _killed(process.pid)
    workers = {line["pid"] for line in made.lines("killed")}
    # Ray takes the workers of a dead driver away by itself; until then they hold the CPUs.
    wait_until(
        lambda: not any(psutil.pid_exists(pid) for pid in workers), "the workers' end", lambda: made.log("killed")
    )
    return hit


_KILLS = {"worker": _kill_worker, "node": _kill_node, "driver": _kill_driver}


def _killed(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _last_epochs(made: Farm, run: str) -> list[dict[str, Any]]:
    """What rank 0 reported of each epoch, the last time it did."""
    found = {line["metrics"]["epoch"]: line for line in made.lines(run, "epoch") if line["rank"] == 0}
    return [found[epoch] for epoch in sorted(found)]


def _equal_ends(room: Room, *runs: str) -> tuple[int, int]:
    """How many tensors of the last checkpoints are equal, bit for bit, and how many are not."""
    first, second = (_tensors(room, run) for run in runs)
    differ = sum(not torch.equal(first[name], second[name]) for name in first) + len(first.keys() ^ second.keys())
    return len(first) - differ, differ


def _tensors(room: Room, run: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        fetch_newest(room.store, run, Path(folder))
        return dict(_leaves(load_train_state(load_checkpoint(Path(folder))), ""))


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{name}/{key}")
    elif not isinstance(tree, str | None):
        yield name, torch.as_tensor(tree)


def _lost_steps(lines: Sequence[dict[str, Any]], steps: int) -> list[int]:
    """Each time the run went back: how many steps were done a second time."""
    lost: list[int] = []
    before: int | None = None
    for line in lines:
        if line["rank"] == 0:
            at = line["epoch"] * steps + line["step"]
            if before is not None and at <= before:
                lost.append(before + 1 - at)
            before = at
    return lost


def _coverage(lines: Sequence[dict[str, Any]]) -> dict[int, tuple[set[int], set[int]]]:
    """For each epoch the samples whose step counted, and how often each did."""
    counted: dict[tuple[int, int, int], list[Any]] = {}
    for line in lines:
        for part, samples in zip(line["parts"], line["samples"], strict=True):
            counted[line["epoch"], line["step"], part] = samples
    epochs: dict[int, Counter[int]] = {}
    for (epoch, _, _), samples in counted.items():
        epochs.setdefault(epoch, Counter()).update(index for of, index, again in samples if of == epoch and not again)
    return {epoch: (set(found), set(found.values())) for epoch, found in epochs.items()}


# ---------------------------------------------------------------------------- elastic


def elastic(room: Room, options: argparse.Namespace) -> list[Row]:
    config = room.variant("elastic", train__epochs=6, train__min_workers=1, train__steps_per_epoch=60)
    with farm(room.scratch) as made:
        with made.driver(room.store.uri, "whole", config) as process:
            finish(process, lambda: made.log("whole"))
        with made.driver(room.store.uri, "elastic", config, "2") as process:
            for world, act in ((2, made.kill_node), (1, made.add), (2, None)):
                wait_until(
                    lambda wanted=world, now=process: _worlds(made)[-1:] == [wanted] or now.poll() is not None,
                    f"{world} workers", lambda: made.log("elastic"),
                )  # fmt: skip
                if act is not None:
                    act()
            finish(process, lambda: made.log("elastic"))
    worlds = _worlds(made)
    orders = [_order(made.lines(run)) for run in ("whole", "elastic")]
    losses = [_last_epochs(made, run)[-1]["metrics"]["loss/total"] for run in ("whole", "elastic")]
    note = f"workers: {' -> '.join(map(str, worlds))}"
    return [
        measured("elastic: sizes of the worker group", len(worlds), ">= 3", n=1, note=note),
        measured(
            "elastic: steps on other samples than with 2 workers throughout",
            sum(orders[0][step] != samples for step, samples in orders[1].items()) + len(orders[0].keys() ^ orders[1]),
            "== 0", n=len(orders[0]), note="all samples of each global batch, in order",
        ),
        measured("elastic: difference of the final loss", 100 * abs(losses[1] / losses[0] - 1), "<= 1", unit="%", n=1),
    ]  # fmt: skip


def _worlds(made: Farm) -> list[int]:
    """The sizes of the worker group, one after the other."""
    sizes = [line["world"] for line in made.lines("elastic")]
    return [size for place, size in enumerate(sizes) if not place or sizes[place - 1] != size]


def _order(lines: Sequence[dict[str, Any]]) -> dict[tuple[int, int], list[Any]]:
    """For each step its micro-batches in order, from the last time it was done."""
    found: dict[tuple[int, int], dict[int, Any]] = {}
    for line in lines:
        parts = dict(zip(line["parts"], line["samples"], strict=True))
        found.setdefault((line["epoch"], line["step"]), {}).update(parts)
    return {at: [parts[part] for part in sorted(parts)] for at, parts in found.items()}


# ---------------------------------------------------------------------------- drain


def drain(room: Room, options: argparse.Namespace) -> list[Row]:
    """A node is told that it will be taken away in 30 s, and then is; nothing else is saved within the epoch."""
    config = room.variant("drain", train__epochs=1, train__steps_per_epoch=2000, train__checkpoint_steps=None)
    with farm(room.scratch) as made, made.driver(room.store.uri, "drain", config) as process:
        _at_step(made, process, 20)
        told = _tell(made)
        wait_until(lambda: bool(made.lines("drain", "saved")), "a checkpoint", lambda: made.log("drain"))
        saved = made.lines("drain", "saved")[0]
        before = len(made.lines("drain"))
        made.kill_node()
        made.add()
        wait_until(lambda: len(made.lines("drain")) > before + 4, "the run to go on", lambda: made.log("drain"))
        lines = made.lines("drain")
        resumed = min(line["step"] for line in lines if line["time"] > saved["time"] and line["pid"] != saved["pid"])
        reached = max(line["step"] for line in lines[:before])
    return [
        measured("drain: seconds from the notice to a whole checkpoint", saved["time"] - told, "<= 30", unit="s", n=1),
        measured("drain: steps done again", reached + 1 - saved["step"], f"<= {reached - 20}", n=1, note="of those"
                 f" since the start: {reached + 1}; without the notice all of them"),
        Row("drain: first step after the node was lost", resumed, note=f"saved at step {saved['step']}"),
    ]  # fmt: skip


def _at_step(made: Farm, process: "subprocess.Popen[bytes]", step: int) -> None:
    wait_until(
        lambda: any(line["step"] >= step for line in made.lines("drain")) or process.poll() is not None,
        f"step {step}", lambda: made.log("drain"),
    )  # fmt: skip


def _tell(made: Farm) -> float:
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    now = time.time()
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = GcsClient(address=made.cluster.address)
    accepted, why = client.drain_node(made.nodes[-1].node_id, reason, "taken away", int((now + 30) * 1000))
    if not accepted:
        raise SystemExit(f"Ray refused to drain the node: {why}")
    return now


PARTS: dict[str, Callable[[Room, argparse.Namespace], list[Row]]] = {
    "kills": kills,
    "elastic": elastic,
    "drain": drain,
    "writers": lambda room, options: kill_writers(room.scratch, room.config, options.writers, options.seed),
}

if __name__ == "__main__":
    sys.exit(main())
