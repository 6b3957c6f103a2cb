"""Kill, spoil and starve a service that is under load, and count what was lost, doubled or wrong.

    python tests/benchmarks/chaos_serve.py [--only kills rollouts store malformed] [--requests 5000] [--rollouts 10]

All of it runs on this machine: the local stack (S3 server, Ray), `kintsugi serve`, and the gateway in front of it.
"""

import argparse
import itertools
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from gateway import Gateway
from malformed import corpus
from rows import Row, measured, output_of, print_table, write_rows
from serve_plant import Plant, plant, publish
from train_cluster import wait_until

from kintsugi import imaging
from kintsugi.registry import ModelVersion, Registry
from kintsugi.restore.restorer import Restorer
from kintsugi_serve.client import Client, RestoredImage, RetryBudget, ServiceError

PARTS = ("kills", "rollouts", "store", "malformed")


@dataclass
class Judge:
    """What every version makes of every image, by the Restorer alone."""

    registry: Registry
    images: list[bytes]
    known: dict[str, list[bytes]] = field(default_factory=dict[str, list[bytes]])

    def learn(self, version: ModelVersion) -> None:
        restorer = Restorer.from_checkpoint(self.registry.fetch(version))
        decoded = [imaging.decode(image) for image in self.images]
        self.known[version.ref] = [imaging.encode(restorer.restore(image).image) for image in decoded]

    def is_right(self, index: int, answer: RestoredImage) -> bool:
        return answer.data == self.known[answer.model][index % len(self.images)]


def pictures(count: int = 16) -> list[bytes]:
    """8- and 16-bit PNG and TIFF files of 96 px, each with noise of its own."""
    found: list[bytes] = []
    for index in range(count):
        generator = np.random.default_rng(index)
        dtype: type[np.uint8] | type[np.uint16] = (np.uint8, np.uint16)[index % 2]
        top = int(np.iinfo(dtype).max)
        pixels = np.clip(generator.normal(0.5, 0.1, (96, 96)), 0, 1) * top
        found.append(imaging.encode(imaging.Image(pixels.astype(dtype), ("png", "tiff")[index // 2 % 2], top)))
    return found


@dataclass
class Tally:
    """What came of the requests."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    right: int = 0
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter[str])
    models: Counter[str] = field(default_factory=Counter[str])

    def add(self, answer: RestoredImage | ServiceError, right: bool) -> None:
        with self.lock:
            if isinstance(answer, ServiceError):
                self.lost[f"{answer.status} {answer.code}"] += 1
                return
            self.models[answer.model] += 1
            self.right += right
            self.wrong += not right

    @property
    def done(self) -> int:
        return self.right + self.wrong + self.lost.total()


def load(client: Client, judge: Judge, wanted: Callable[[int], bool], tally: Tally, workers: int = 8) -> None:
    """Restore image after image with `workers` at a time, as long as `wanted(number)`."""
    numbers = itertools.count()
    taking, stopped = threading.Lock(), threading.Event()

    def work() -> None:
        while True:
            with taking:
                number = next(numbers)
            if stopped.is_set() or not wanted(number):
                return
            try:
                answer: RestoredImage | ServiceError = client.restore(judge.images[number % len(judge.images)])
            except ServiceError as error:
                answer = error
            tally.add(answer, isinstance(answer, RestoredImage) and judge.is_right(number, answer))

    with ThreadPoolExecutor(workers) as pool:
        try:
            for each in [pool.submit(work) for _ in range(workers)]:
                each.result()
        finally:
            stopped.set()


def kills(here: Plant, gateway: Gateway, requests: int, every_s: float) -> list[Row]:
    """SIGKILL a replica every `every_s` while images are restored, by their bytes and from S3 to S3."""
    registry = Registry(here.store)
    judge = Judge(registry, pictures())
    judge.learn(registry.resolve("unet@1"))
    store = here.store
    uploaded = [f"chaos/in/{index}" for index in range(len(judge.images))]
    for key, image in zip(uploaded, judge.images, strict=True):
        store.put(key, image)
    ended, tally, killed = threading.Event(), Tally(), 0
    from_s3: Counter[str] = Counter()
    patience = RetryBudget(reserve=1000)
    with Client(gateway.address, retries=60, max_wait_s=2, timeout=60, budget=patience) as client:

        def s3_work() -> None:
            number = 0
            while not ended.is_set():
                index = number % len(uploaded)
                output = f"{store.uri}/chaos/out/{number}"
                try:
                    client.restore_s3(f"{store.uri}/{uploaded[index]}", output)
                except ServiceError as error:
                    from_s3[f"{error.status} {error.code}"] += 1
                else:
                    kept = store.get(f"chaos/out/{number}")
                    from_s3["right" if kept == judge.known["unet@1"][index] else "wrong"] += 1
                number += 1

        def kill() -> None:
            nonlocal killed
            generator = random.Random(0)
            while not ended.wait(every_s):
                alive = here.replicas()
                if alive:
                    generator.choice(alive).send_signal(signal.SIGKILL)
                    killed += 1

        threads = [threading.Thread(target=work) for work in (s3_work, kill)]
        for thread in threads:
            thread.start()
        started = time.monotonic()
        load(client, judge, lambda _: tally.done + from_s3.total() < requests, tally)
        spent = time.monotonic() - started
        ended.set()
        for thread in threads:
            thread.join()
    results = [info.key for info in store.list("results/") if not info.key.endswith(".json")]
    asked, again = tries_of(gateway)
    tries = f"{asked} tries of the client, {again} more of the gateway"
    note = f"{killed} kills in {spent:.0f} s; {tries}; {_told(tally.lost)}"
    lost = tally.lost.total() + sum(count for what, count in from_s3.items() if what not in ("right", "wrong"))
    return [
        measured("kills: images lost", lost, "== 0", n=tally.done + from_s3.total(), note=note),
        measured("kills: wrong bytes", tally.wrong + from_s3["wrong"], "== 0", n=tally.right + from_s3["right"]),
        measured("kills: results kept twice", len(results) - len(set(judge.images)), "== 0", n=from_s3.total()),
        measured("kills: replicas killed", killed, f">= {max(1, requests // 250)}", n=requests),
    ]


def tries_of(gateway: Gateway) -> tuple[int, int]:
    """Requests that came to the gateway, and those that it sent to the service once more."""
    lines = [json.loads(line) for line in (gateway.folder / "access.log").read_text().splitlines()]
    return len(lines), sum(str(line.get("upstream_status", "")).count(",") for line in lines)


def rollouts(here: Plant, gateway: Gateway, count: int) -> list[Row]:
    """Promote version after version under load; every third one is bad and must not come into service."""
    registry = Registry(here.store)
    judge = Judge(registry, pictures())
    judge.learn(registry.resolve("unet@production"))
    ended, tally = threading.Event(), Tally()
    spoils = {index: ("weights", "golden", "config")[position % 3] for position, index in enumerate(range(2, count, 3))}
    swaps: list[float] = []
    kept_out = 0
    with Client(gateway.address, retries=0, timeout=60) as client:
        worker = threading.Thread(target=load, args=(client, judge, lambda _: not ended.is_set(), tally, 4))
        worker.start()
        for index in range(count):
            version = publish(here, 100 + index, spoils.get(index, ""))
            good = index not in spoils
            if good:
                judge.learn(version)
            started = time.monotonic()
            registry.promote(version.ref)
            seen = _wait_for(client, version.ref, refused=not good)
            kept_out += not good and seen
            if good:
                swaps.append(time.monotonic() - started)
            else:
                registry.rollback("unet")
        ended.set()
        worker.join()
    bad = len(spoils)
    return [
        measured("roll-outs: failed, no retries", tally.lost.total(), "== 0", n=tally.done, note=_told(tally.lost)),
        measured("roll-outs: wrong bytes for the version named", tally.wrong, "== 0", n=tally.right),
        measured("roll-outs: bad versions kept out of service", kept_out, f"== {bad}", n=count),
        measured("roll-outs: longest until the version is in service", max(swaps), "<= 30", unit="s", n=len(swaps)),
    ]


def _wait_for(client: Client, ref: str, *, refused: bool) -> bool:
    """Until the service answers with the version, or says that it refused it."""
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        models = client.models()
        serving = "{name}@{version}".format(**models["serving"])
        if serving == ref:
            return not refused
        if refused and models["refused"] and ref in models["refused"]["detail"]:
            return True
        time.sleep(0.2)
    raise RuntimeError(f"{ref} neither came into service nor was refused")


def store_away(here: Plant, gateway: Gateway, seconds: float) -> list[Row]:
    """Stop the S3 server's process for a while: what is uploaded must be answered all the same."""
    registry = Registry(here.store)
    judge = Judge(registry, pictures())
    # A replica that had not looked yet when the store went away goes on with the version before.
    for version in filter(None, (registry.resolve("unet@production"), registry.before("unet@production"))):
        judge.learn(version)
    tally = Tally()
    server = here.s3_server()
    with Client(gateway.address, retries=0, timeout=60) as client:
        server.suspend()
        try:
            ends = time.monotonic() + seconds
            load(client, judge, lambda _: time.monotonic() < ends, tally, 4)
        finally:
            server.resume()
    note, failed = f"S3 away for {seconds:.0f} s; {_told(tally.lost)}", tally.lost.total() + tally.wrong
    return [measured("S3 away: uploads not answered", failed, "== 0", n=tally.done, note=note)]


def malformed(here: Plant, address: str, count: int, replicas: int) -> list[Row]:
    """Send broken and hostile images; the service must refuse each with a code, and live."""
    import httpx2

    # What was killed before this part may still be starting.
    wait_until(lambda: len(here.replicas()) == replicas, f"{replicas} replicas", lambda: f"{len(here.replicas())} are")
    before = here.replicas()
    with httpx2.Client(base_url=address, timeout=120) as client:
        for image in pictures():
            client.post("/v1/restore", content=image)
        memory = _memory(before)
        statuses: Counter[str] = Counter()
        strange: list[str] = []
        for name, data in corpus(count, seed=0):
            answer = client.post("/v1/restore", content=data)
            refused = 400 <= answer.status_code < 500 and "code" in answer.json()
            statuses[str(answer.status_code)] += 1
            if not refused:
                strange.append(f"{name}: {answer.status_code}")
        grown = (_memory(before) - memory) / 2**20
        ended = len({process.pid for process in before} - {process.pid for process in here.replicas()})
    return [
        measured("malformed: not refused with a code", len(strange), "== 0", n=count, note="; ".join(strange[:3])),
        measured("malformed: 5xx", sum(n for code, n in statuses.items() if code >= "500"), "== 0", n=count),
        measured("malformed: replicas that ended", ended, "== 0", n=count, note=_told(statuses)),
        measured("malformed: growth of the replicas' memory", grown, "<= 50", unit="MiB", n=count),
    ]


def _memory(processes: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two kills")
    parser.add_argument("--rollouts", type=int, default=10)
    parser.add_argument("--away", type=float, default=60.0, help="seconds without S3")
    parser.add_argument("--malformed", type=int, default=2000)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--output", type=Path, default=output_of("chaos-serve"))
    options = parser.parse_args(words)
    rows: list[Row] = []
    with plant(options.replicas) as (here, gateway, address):
        parts: dict[str, Callable[[], list[Row]]] = {
            "kills": lambda: kills(here, gateway, options.requests, options.every),
            "rollouts": lambda: rollouts(here, gateway, options.rollouts),
            "store": lambda: store_away(here, gateway, options.away),
            "malformed": lambda: malformed(here, address, options.malformed, options.replicas),
        }
        for part in options.only:
            rows += parts[part]()
            print_table(rows[-4:])
    write_rows(rows, options.output)
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
