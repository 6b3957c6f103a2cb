"""make bench-serve: what the service costs, and how it bears too much load, as ratios measured in one run.

Everything is on this machine and over loopback, so that servers, clients and whatever else runs share its cores.
What is compared takes turns. `--env NAME=VALUE` sets a variable of Ray's processes, to see what it is worth.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rows import Row, measured, output_of, print_table, write_rows
from serve_autoscale import autoscaling
from serve_cluster import HERE, Service, publish_model, raised, ray_serve, serving, write_images
from serve_identity import IdentityReplica
from serve_load import Load, Sample, Summary, background_load, percentile, run_load
from serve_peers import Peer, PeerFailed, install, peer

from kintsugi.storage import LocalStore
from kintsugi_serve.schemas import Args

Part = Callable[[argparse.Namespace], list[Row]]
SIDE = 256
DIRECT = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench-serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--workers", type=int, default=2, help="processes that do the work, of each server")
    parser.add_argument("--overload-seconds", type=float, default=10)
    parser.add_argument("--figure", type=Path, help="draw the autoscaling into this file")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=output_of("bench-serve"))
    options = parser.parse_args(arguments)
    with raised({"OMP_NUM_THREADS": "1"} | dict(pair.split("=", 1) for pair in options.env)):
        rows = [row for part in options.only for row in PARTS[part](options)]
    print_table(rows)
    write_rows(rows, options.output)
    return int(any(row.holds is False for row in rows))


# ------------------------------------------------------------------------ what is sent where


@dataclass
class Target:
    """A server under test: its samples, turn by turn, and the CPU time of its processes."""

    name: str
    load: Load
    processes: dict[str, list[psutil.Process]] = field(default_factory=dict[str, list[psutil.Process]])
    turns: list[list[Sample]] = field(default_factory=list[list[Sample]])
    cpu_s: dict[str, float] = field(default_factory=dict[str, float])

    def turn(self) -> None:
        before = {name: cpu_s(found) for name, found in self.processes.items()}
        self.turns.append(run_load(self.load))
        for name, found in self.processes.items():
            self.cpu_s[name] = self.cpu_s.get(name, 0) + cpu_s(found) - before[name]

    @property
    def summaries(self) -> list[Summary]:
        return [Summary.of(turn) for turn in self.turns]

    @property
    def samples(self) -> list[Sample]:
        return [sample for turn in self.turns for sample in turn]

    @property
    def rate(self) -> float:
        return median(summary.per_second for summary in self.summaries)

    @property
    def p50(self) -> float:
        return median(summary.p50 for summary in self.summaries)

    @property
    def p99(self) -> float:
        return percentile([1000 * sample.seconds for sample in self.samples], 99)


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def take_turns(targets: Sequence[Target], repeats: int) -> None:
    """Each once in every round, forwards and backwards, after a round that does not count."""
    for target in targets:
        run_load(target.load)
    for number in range(repeats):
        for target in targets if number % 2 else reversed(targets):
            target.turn()
    for target in targets:
        wrong = [sample.status for sample in target.samples if sample.status != 200]
        if wrong:
            raise SystemExit(f"{target.name} answered {len(wrong)} of {len(target.samples)} with {set(wrong)}")


def ratio(one: Target, other: Target, of: Callable[[Summary], float]) -> float:
    """Median over the rounds, so that both saw the same machine."""
    return median(of(a) / of(b) for a, b in zip(one.summaries, other.summaries, strict=True))


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kintsugi-bench-") as folder:
        path = Path(folder)
        (path / "store").mkdir()
        with raised({"KINTSUGI_CACHE": str(path / "cache")}):
            yield path


def arguments_for(folder: Path, replicas: int, **more: Any) -> Args:
    """As the service is configured by default, with a fixed number of replicas."""
    fixed: dict[str, Any] = {"store": str(folder / "store"), "min_replicas": replicas, "max_replicas": replicas}
    return Args(**(fixed | more))


def targets_of(service: Service, files: tuple[str, ...], options: argparse.Namespace, connections: int) -> list[Target]:
    """Through Ray's proxy, and straight at the ingress."""
    parts = {part: service.processes(part) for part in ("Proxy", "Ingress", "Replica")}
    parts["decoders"] = [child for replica in parts["Replica"] for child in replica.children(recursive=True)]
    ways = {"through Ray's proxy": service.address, "at the ingress": service.direct()}
    return [
        Target(way, Load(address, files, connections, options.seconds), parts)
        for way, address in ways.items()
        if address
    ]


def target_of(server: Peer, files: tuple[str, ...], options: argparse.Namespace, connections: int) -> Target:
    load = Load(
        server.address, server.bodies(files), connections, options.seconds, path=server.path, headers=server.headers
    )
    root = psutil.Process(server.pid)
    return Target(server.kind, load, {"all": [root, *root.children(recursive=True)]})


# -------------------------------------------------------------------------- the service's own cost


def overhead(options: argparse.Namespace) -> list[Row]:
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        files = write_images(folder / "images", SIDE)
        servers = [stack.enter_context(peer(kind)) for kind in ("echo", "bare")]
        stack.enter_context(raised(DIRECT))
        cluster = stack.enter_context(ray_serve(4))
        service = stack.enter_context(serving(cluster, arguments_for(folder, 1), IdentityReplica))
        echo, bare = (target_of(server, files, options, 1) for server in servers)
        ways = targets_of(service, files, options, 1)
        take_turns([echo, bare, *ways], options.repeats)
        rows = [row for way in ways for row in overhead_rows(way, bare)]
        memory = {
            part: service.processes(part)[0].memory_info().rss / 2**20 for part in ("Proxy", "Ingress", "Replica")
        }
    told = f"echo server: {1 / median(s.p50 / 1000 for s in echo.summaries):.0f} requests/s"
    return [
        *rows,
        Row("bare FastAPI: p99", bare.p99, "ms", n=len(bare.samples), note="one connection"),
        Row("the load generator's own p50", echo.p50, "ms", n=len(echo.samples), note=told),
        *(Row(f"memory of {part}", size, "MiB", n=1, note="resident; no model") for part, size in memory.items()),
    ]


def overhead_rows(way: Target, bare: Target) -> list[Row]:
    timing = [sample.timing_ms for sample in way.samples]
    stages = ", ".join(f"{name} {median(t[name] for t in timing):.1f}" for name in timing[0])
    cpu = {part: 1000 * spent / len(way.samples) for part, spent in way.cpu_s.items()}
    told = ", ".join(f"{part} {spent:.1f}" for part, spent in cpu.items())
    bare_cpu = 1000 * bare.cpu_s["all"] / len(bare.samples)
    n = len(way.samples)
    note = f"{SIDE} x {SIDE} px PNG, identity, one connection: {way.p50:.1f} and {bare.p50:.1f} ms"
    return [
        measured(
            f"p50 {way.name}, of bare FastAPI's", ratio(way, bare, lambda s: s.p50), "<= 2.0", n=n, note=note
        ),
        Row(f"p99 {way.name}", way.p99, "ms", n=n, note=f"of which, in the median: {stages} ms"),
        Row(
            f"CPU time {way.name}, of bare FastAPI's", sum(cpu.values()) / bare_cpu, n=n,
            note=f"{told} and {bare_cpu:.1f} ms a request",
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- peers


def peers(options: argparse.Namespace) -> list[Row]:
    figure = "requests/s {} with 8 connections, of {}'s"
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        files = write_images(folder / "images", SIDE)
        others: list[Target] = []
        failed: list[Row] = []
        for kind in ("litserve", "bentoml"):
            try:
                install()
                server = stack.enter_context(peer(kind, options.workers))
            except PeerFailed as error:
                failed.append(Row(figure.format("", kind), None, "", ">= 0.8", False, note=str(error)))
            else:
                others.append(target_of(server, files, options, 8))
        stack.enter_context(raised(DIRECT))
        cluster = stack.enter_context(ray_serve(4))
        service = stack.enter_context(serving(cluster, arguments_for(folder, options.workers), IdentityReplica))
        ways = targets_of(service, files, options, 8)
        take_turns([*others, *ways], options.repeats)
    rows = [
        measured(
            figure.format(way.name, other.name), ratio(way, other, lambda s: s.per_second), ">= 0.8",
            n=len(way.samples), note=f"{way.rate:.0f} and {other.rate:.0f}/s; {options.workers} workers each",
        )
        for way in ways
        for other in others
    ]  # fmt: skip
    return rows + failed


# ------------------------------------------------------------------------------------- with a model


def model(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    with scratch() as folder:
        publish_model(LocalStore(folder / "store"), folder)
        files = write_images(folder / "images", SIDE)
        with ray_serve(4) as cluster:
            for replicas, threads in ((2, 1), (1, 2)):
                args = arguments_for(folder, replicas, threads=threads, num_cpus=threads)
                with serving(cluster, args) as service:
                    way = targets_of(service, files, options, 4)[0]
                    rows.append(loop_row(way, folder, options, f"{replicas} replicas of {threads} threads"))
    return rows


def loop_row(way: Target, folder: Path, options: argparse.Namespace, setting: str) -> Row:
    """The endpoint and a loop without it, in turn."""
    run_load(way.load)
    loops: list[float] = []
    for _ in range(options.repeats):
        loops.append(loop_rate(folder, options.seconds))
        way.turn()
    rates = [summary.per_second for summary in way.summaries]
    shares = [rate / alone for rate, alone in zip(rates, loops, strict=True)]
    note = f"{SIDE} x {SIDE} px, 4 connections: {median(rates):.1f} and {median(loops):.1f} images/s"
    figure = f"demo model's throughput, of its loop with 2 threads: {setting}"
    return measured(figure, median(shares), ">= 0.95", n=len(way.samples), note=note)


def loop_rate(folder: Path, seconds: float) -> float:
    words = [sys.executable, str(HERE / "serve_loop.py"), str(folder / "checkpoint"), str(folder / "images")]
    done = subprocess.run([*words, str(seconds)], capture_output=True, text=True, check=True)
    return float(done.stdout)


# ------------------------------------------------------------------------------------- overload


def overload(options: argparse.Namespace) -> list[Row]:
    with scratch() as folder:
        publish_model(LocalStore(folder / "store"), folder)
        files = write_images(folder / "images", SIDE)
        with ray_serve(4) as cluster, serving(cluster, arguments_for(folder, 1)) as service:
            calm_load = Load(service.address, files, 1, 2 * options.seconds)
            run_load(calm_load)
            calm = Summary.of(run_load(calm_load))
            peak = Summary.of(run_load(Load(service.address, files, 8, 2 * options.seconds)))
            seconds = options.overload_seconds
            with background_load(Load(service.address, files, 10_000, seconds, rate=5 * peak.per_second)) as load:
                time.sleep(seconds)  # the load's own length
                probes = run_load(Load(service.address, files, 1, 15))
                storm = load.samples()
            ended = max(sample.at for sample in storm)
    return overload_rows(calm, peak, storm, recovery_s(probes, calm.p50, ended), seconds)


def overload_rows(calm: Summary, peak: Summary, storm: list[Sample], recovered: float, seconds: float) -> list[Row]:
    begun, ended = storm[0].at, max(sample.at for sample in storm)
    good = [s for s in storm if s.status == 200 and begun + 1 < s.at + s.seconds < ended]
    refused = [sample for sample in storm if sample.status in (429, 503)]
    others = len(storm) - len(refused) - sum(sample.status == 200 for sample in storm)
    times = [1000 * sample.seconds for sample in refused] or [float("inf")]
    n = len(storm)
    goodput = len(good) / (ended - begun - 1)
    note = f"{goodput:.1f} and {peak.per_second:.1f}/s; {n / seconds:.0f}/s arrived for {seconds:.0f} s, 1 replica"
    retry = sum("retry-after" in sample.headers for sample in refused) / max(len(refused), 1)
    quick = 100 * sum(spent <= 100 for spent in times) / len(times)
    return [
        measured("goodput at 5 times the peak load, of the peak", goodput / peak.per_second, ">= 0.9", n=n, note=note),
        measured("refusals: 99th percentile", percentile(times, 99), "<= 100", unit="ms", n=len(refused)),
        Row("refusals within 100 ms", quick, "%", n=len(refused), note=f"median {median(times):.1f} ms"),
        measured("refusals with Retry-After", 100 * retry, ">= 100", unit="%", n=len(refused)),
        measured("requests under overload with another answer, or none", others, "== 0", n=n),
        measured(
            "recovery: p50 within twice the calm one", recovered, "<= 10", unit="s", n=1, note=f"calm {calm.p50:.0f} ms"
        ),
    ]


def recovery_s(probes: list[Sample], calm_ms: float, ended: float) -> float:
    """Seconds from the overload's end until the median of five probes in a row is within twice the calm one."""
    for first in range(len(probes) - 4):
        five = probes[first : first + 5]
        if all(p.status == 200 for p in five) and 1000 * median(p.seconds for p in five) <= 2 * calm_ms:
            return max(five[0].at + five[0].seconds - ended, 0.0)
    return float("inf")


def autoscale(options: argparse.Namespace) -> list[Row]:
    with scratch() as folder:
        publish_model(LocalStore(folder / "store"), folder)
        return autoscaling(folder, write_images(folder / "images", SIDE), options.figure)


PARTS: dict[str, Part] = {
    "overhead": overhead,
    "peers": peers,
    "model": model,
    "overload": overload,
    "autoscale": autoscale,
}

if __name__ == "__main__":
    sys.exit(main())
