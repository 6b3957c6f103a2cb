"""What is left of a search whose driver, workers and nodes are killed, and what Ray Tune costs a search."""

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import psutil
from rows import Row, measured
from train_cluster import Farm, farm, finish, wait_until

from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.data.dataset import build_dataset
from kintsugi.data.synthetic import write_synthetic
from kintsugi.storage import LocalStore
from kintsugi_tune.ledger import Ledger, load_plan
from kintsugi_tune.record import SearchRecord

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "tune" / "spaces" / "restoration.yaml"
VALUES = {
    "data.dataset": "chaos", "data.crop": 32, "data.batch_size": 4, "data.small_images": "mirror",
    "degradation.use_given": False, "model.base": 8, "train.steps_per_epoch": 10, "train.validation_images": 2,
    "train.workers": 1, "train.cpus_per_worker": 1, "train.max_failures": -1,
    "search.trials": 6, "search.screened": 3, "search.epochs": 3, "search.screen_epochs": 2, "search.sampler": "tpe",
    "search.max_concurrent": 1,
}  # fmt: skip
_TITLES = ("ray::RayTrainWorker", "ray::ImplicitFunc", "ray::_run_trial", "ray::TrainController")
_TIMED = ("train/seconds", "train/images_per_second")


def prepare(scratch: Path) -> tuple[LocalStore, ExperimentConfig]:
    store = LocalStore(scratch / "store")
    store.root.mkdir()
    build_dataset("pairs", write_synthetic(scratch / "images", parts=16, size=64), "chaos", store)
    os.environ["KINTSUGI_CACHE"] = str(scratch / "cache")
    return store, with_values(load_config(ROOT / "platform/configs/demo.yaml"), VALUES)


def kill_search(scratch: Path, kills: int, seed: int, **values: Any) -> list[Row]:
    """A search whose processes are killed at random points against one that nobody touches.

    Args:
        values: of the search, for example `trials`.
    """
    store, config = prepare(scratch)
    path = scratch / "search.yaml"
    path.write_text(with_values(config, {f"search.{key}": value for key, value in values.items()}).to_yaml())
    with farm(scratch) as made, _driver(made, store, "straight", path) as process:
        finish(process, lambda: made.log("straight"))
    points = _points(kills, _noted(store, "straight"), random.Random(seed))
    done: list[str] = []
    while not _run_with_kills(scratch, store, path, points, done):
        pass
    straight, killed = (_record(store, name) for name in ("straight", "killed"))
    for a, b in zip(straight.trials, killed.trials, strict=False):
        if _told(a) != _told(b):
            print(f"differs: {_told(a)}\n    and: {_told(b)} {b.reason}")
    differ = [a.number for a, b in zip(straight.trials, killed.trials, strict=False) if _told(a) != _told(b)]
    runs = {key.key.split("/")[3] for key in store.list("runs/killed/trials/")}
    numbers = Counter(trial.number for trial in killed.trials)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(done).items())
    note = f"{kinds}, at random points, one trial at a time"
    ended = sum(trial.state in ("complete", "pruned") for trial in killed.trials)
    return [
        measured("search: kills that hit a running process", len(done), f">= {kills}", n=kills, note=kinds),
        measured(
            "search: trials that differ from those of a search nobody touched",
            len(differ) + abs(len(straight.trials) - len(killed.trials)), "== 0", n=len(straight.trials),
            note=f"values, state, figures of every epoch, exactly; {note}",
        ),
        measured("search: trials that ended", ended, f"== {len(straight.trials)}", n=len(straight.trials)),
        measured(
            "search: trials there are twice", sum(count > 1 for count in numbers.values())
            + len(runs ^ {trial.run.rpartition("/")[2] for trial in killed.trials}), "== 0", n=len(numbers),
            note="by number, and by training run in the store",
        ),
    ]  # fmt: skip


def _noted(store: LocalStore, name: str) -> int:
    """How many things a search has noted: proposals, epochs, ends."""
    return sum(1 for _ in store.list(f"runs/{name}/study/"))


def _points(kills: int, noted: int, dice: random.Random) -> list[tuple[int, float]]:
    """For each kill what the search has noted by then, before its last trial begins, and seconds more to let it run."""
    return [(point, dice.uniform(0, 2)) for point in sorted(dice.sample(range(1, noted - 6), kills))]


def _run_with_kills(
    scratch: Path, store: LocalStore, config: Path, points: list[tuple[int, float]], done: list[str]
) -> bool:
    """Until the search is done, or a kill took the cluster or the driver along; whether it is done."""
    with farm(scratch) as made:
        while True:
            with _driver(made, store, "killed", config) as process:
                while len(done) < len(points):
                    point, more = points[len(done)]
                    wait_until(
                        lambda at=point, now=process: (
                            (_noted(store, "killed") >= at and bool(_workers(made))) or now.poll() is not None
                        ),
                        f"{point} things noted",
                        lambda: made.log("killed"),
                    )
                    with contextlib.suppress(TimeoutExpired):
                        process.wait(more)
                    if process.poll() is not None:
                        return True
                    kind = _KINDS[len(done) % len(_KINDS)]
                    done += [kind] * _KILLS[kind](made, process)
                    if kind == "head":
                        return False
                    if kind == "driver":
                        break
                else:
                    finish(process, lambda: made.log("killed"))
                    return True


def _kill_driver(made: Farm, process: "Popen[bytes]") -> bool:
    workers = _workers(made)
    process.kill()
    process.wait()
    # Ray takes the workers of a dead driver away by itself; until then they hold the CPUs.
    wait_until(lambda: not any(worker.is_running() for worker in workers), "the workers' end", lambda: "")
    return True


def _kill_worker(made: Farm, process: "Popen[bytes]") -> bool:
    """Whatever of the search runs in the cluster just now: a training worker, or a trial's own process."""
    for worker in _workers(made):
        try:
            worker.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
        return True
    return False


def _kill_node(made: Farm, process: "Popen[bytes]") -> bool:
    made.kill_node()
    made.add()
    return True


def _kill_head(made: Farm, process: "Popen[bytes]") -> bool:
    """The head and both nodes; the driver, which waits for a head that never comes, too."""
    for node in (made.cluster.head_node, *made.nodes):
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    process.kill()
    process.wait()
    return True


_KILLS: dict[str, Callable[[Farm, "Popen[bytes]"], bool]] = {
    "driver": _kill_driver,
    "worker": _kill_worker,
    "node": _kill_node,
    "head": _kill_head,
}
_KINDS = list(_KILLS)


def _workers(made: Farm) -> list[psutil.Process]:
    """What the search runs in this cluster, training workers first. Ray names its processes by what runs in them."""
    found: list[tuple[bool, psutil.Process]] = []
    for node in (made.cluster.head_node, *made.nodes):
        for started in node.all_processes.get("raylet", ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(started.process.pid).children(recursive=True):
                    title = " ".join(process.cmdline())
                    if title.startswith(_TITLES):
                        found.append(("RayTrainWorker" not in title, process))
    return [process for _, process in sorted(found, key=lambda entry: entry[0])]


def _driver(made: Farm, store: LocalStore, name: str, config: Path) -> Any:
    return made.driver(store.uri, name, config, str(SPACE), script="tune_driver.py")


def _record(store: LocalStore, name: str) -> SearchRecord:
    return Ledger(store, load_plan(store, name), owner=False).record()


def _told(trial: Any) -> Any:
    curve = [{key: value for key, value in epoch.items() if key not in _TIMED} for epoch in trial.curve]
    return trial.number, trial.state, trial.values, trial.params, trial.point, curve
