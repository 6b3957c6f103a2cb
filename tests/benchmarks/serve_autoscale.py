"""A step of load on a service that may have one to three replicas: how many there are, and what clients see of it.

usage: serve_autoscale.py FIGURE.png
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event, Thread

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ray import serve
from rows import Row, measured, print_table
from serve_cluster import APP, publish_model, raised, ray_serve, serving, write_images
from serve_load import Load, Sample, background_load

from kintsugi.storage import LocalStore
from kintsugi_serve.schemas import Args

MOST = 3
CALM, BUSY = 1, 8
"""Connections that send one request after another."""
STEPS = (15.0, 60.0, 75.0)
"""Seconds of calm, of load, and of calm again."""
DELAYS = {"upscale_delay_s": 2.0, "downscale_delay_s": 10.0}
FLAGS = {"RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}


@dataclass(frozen=True)
class Course:
    """What was seen, in seconds since the start: replicas that run, and requests."""

    step: float
    end: float
    replicas: list[tuple[float, int]]
    samples: list[Sample]

    def reached(self, count: int, after: float) -> float | None:
        """Seconds from `after` until there are `count` replicas."""
        return next((at - after for at, found in self.replicas if at >= after and found == count), None)


@contextmanager
def counted(started: float) -> Iterator[list[tuple[float, int]]]:
    """Running replicas, twice a second, for as long as the context lasts."""
    found: list[tuple[float, int]] = []
    over = Event()

    def look() -> None:
        while not over.wait(0.5):
            states = serve.status().applications[APP].deployments["Replica"].replica_states
            running = sum(count for state, count in states.items() if str(state).endswith("RUNNING"))
            found.append((time.time() - started, running))

    thread = Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def observe(folder: Path, files: tuple[str, ...], steps: Sequence[float] = STEPS) -> Course:
    args = Args(
        store=str(folder / "store"),
        min_replicas=1,
        max_replicas=MOST,
        target_ongoing_requests=2,
        num_cpus=0.5,
        **DELAYS,
    )
    before, busy, _ = steps
    with raised(FLAGS), ray_serve(4) as cluster, serving(cluster, args) as service:
        calm = Load(service.address, files, CALM, sum(steps))
        more = Load(service.address, files, BUSY - CALM, busy)
        started = time.time()
        with counted(started) as replicas, background_load(calm) as always:
            time.sleep(before)
            with background_load(more) as load:
                step = time.time() - started
                samples = load.samples()
            end = time.time() - started
            samples = [*samples, *always.samples()]
    samples = [Sample(s.at - started, s.seconds, s.status, s.body) for s in sorted(samples, key=lambda s: s.at)]
    return Course(step, end, replicas, samples)


def rows_of(course: Course) -> list[Row]:
    told = ", ".join(f"{name} {value:g}" for name, value in DELAYS.items())
    note = f"from {CALM} to {BUSY} connections; {told}, looked at each second"
    up, down = course.reached(MOST, course.step), course.reached(1, course.end)
    failed = sum(sample.status != 200 for sample in course.samples)
    return [
        Row(f"autoscaling: from 1 to {MOST} replicas", up, "s", "reached", up is not None, 1, note),
        Row(f"autoscaling: back from {MOST} to 1", down, "s", "reached", down is not None, 1, note),
        measured("autoscaling: requests that failed meanwhile", failed, "== 0", n=len(course.samples)),
    ]


def draw(course: Course, path: Path) -> None:
    """Load, replicas and latency over time, one below the other."""
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    load, replicas, latency = figure.subplots(3, 1, sharex=True)
    last = max(sample.at for sample in course.samples)
    load.step([0, course.step, course.end, last], [CALM, BUSY, CALM, CALM], where="post", color="#4c566a")
    load.set_ylabel("connections")
    replicas.step(*zip(*course.replicas, strict=True), where="post", color="#b8860b", linewidth=2)
    replicas.set_ylabel("running replicas")
    replicas.set_yticks(range(MOST + 1))
    seconds = {second: [s.seconds for s in course.samples if int(s.at) == second] for second in range(int(last))}
    seen = {second + 0.5: 1000 * median(found) for second, found in seconds.items() if found}
    latency.plot(list(seen), list(seen.values()), color="#2e5e8c")
    latency.set_ylabel("median latency, ms")
    latency.set_ylim(bottom=0)
    latency.set_xlabel("seconds")
    for axes in (load, replicas, latency):
        axes.grid(color="#dddddd")
        axes.set_axisbelow(True)
        axes.axvspan(course.step, course.end, color="#f3ead7", zorder=0)
    load.set_ylim(0, BUSY + 1)
    figure.suptitle(f"A step of load: {CALM} to {BUSY} connections, each sending one request after another")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def autoscaling(folder: Path, files: tuple[str, ...], figure: Path | None = None) -> list[Row]:
    """Rows of one course, drawn into `figure` if that is given; `folder` holds the store."""
    course = observe(folder, files)
    if figure is not None:
        draw(course, figure)
    return rows_of(course)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("figure", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kintsugi-bench-") as scratch:
        folder = Path(scratch)
        (folder / "store").mkdir()
        with raised({"KINTSUGI_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}):
            publish_model(LocalStore(folder / "store"), folder)
            rows = autoscaling(folder, write_images(folder / "images", 256), options.figure)
    print_table(rows)
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
