"""Load for an HTTP service: images posted over kept connections, from a process of its own that only asyncio runs.

Closed loop (`rate` is None): every connection sends its next request when the last was answered. Open loop: requests
are due at random moments of a fixed rate, whether or not earlier ones were answered, and their time counts from then.

    samples = run_load(Load("127.0.0.1:8000", ("image.png",), connections=8, seconds=5))
    with background_load(Load(..., rate=50, seconds=60)) as load:   # meanwhile: kill something
        ...
    samples = load.samples()

As a script it reads a `Load` as JSON from standard input and writes one line a sample.
"""

import asyncio
import gc
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

BROKEN = 0
"""Status of a request that got no answer: refused, reset, or cut off."""


@dataclass(frozen=True)
class Load:
    """What to send.

    Attributes:
        address: HOST:PORT.
        bodies: files, posted in turn.
        connections: at most so many at a time; an open loop opens them as it needs them.
        seconds: after which nothing new is sent; what is on its way is still awaited.
        requests: after which nothing new is sent, if that is earlier.
        rate: requests a second of an open loop; None for a closed one.
        headers: sent with every request.
    """

    address: str
    bodies: tuple[str, ...]
    connections: int = 1
    seconds: float = 5.0
    requests: int | None = None
    rate: float | None = None
    path: str = "/v1/restore"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "image/png"})
    patience_s: float = 60.0
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        at: when it was due (open loop) or sent (closed), in seconds since the epoch.
        seconds: from then to the answer's last byte.
        status: of HTTP, or `BROKEN`.
        body: which of the load's bodies.
        sha256: of the answer.
        headers: of the answer, with lower-case names.
    """

    at: float
    seconds: float
    status: int
    body: int
    sha256: str = ""
    headers: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def timing_ms(self) -> dict[str, float]:
        """What the Server-Timing header says."""
        parts = (part.split(";dur=") for part in self.headers.get("server-timing", "").split(",") if ";dur=" in part)
        return {name.strip(): float(spent) for name, spent in parts}


@dataclass(frozen=True)
class Summary:
    """Of some samples: how many, how many a second were answered with 200, and their latencies in ms."""

    n: int
    good: int
    per_second: float
    p50: float
    p99: float
    statuses: dict[int, int]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Summary":
        good = [sample for sample in samples if sample.status == 200]
        if not good:
            return cls(len(samples), 0, 0.0, float("inf"), float("inf"), dict(Counter(s.status for s in samples)))
        span = max(s.at + s.seconds for s in samples) - min(s.at for s in samples)
        times = [1000 * sample.seconds for sample in good]
        return cls(
            len(samples),
            len(good),
            len(good) / span,
            percentile(times, 50),
            percentile(times, 99),
            dict(Counter(s.status for s in samples)),
        )


def percentile(values: Sequence[float], share: int) -> float:
    """The `share`-th of 100 quantiles."""
    return values[0] if len(values) == 1 else quantiles(values, n=100, method="inclusive")[share - 1]


# ------------------------------------------------------------------------ from outside


class Running:
    """Load that runs in a process of its own."""

    def __init__(self, load: Load) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(load)).encode())
        self._process.stdin.close()
        self._samples: list[Sample] | None = None

    def stop(self) -> None:
        """Send nothing new; what is on its way is still awaited."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def samples(self) -> list[Sample]:
        """All samples in the order of their sending, once the load is over."""
        if self._samples is None:
            assert self._process.stdout is not None
            self._samples = [Sample(**json.loads(line)) for line in self._process.stdout]
            if self._process.wait():
                raise SystemExit(f"the load generator failed: {self._process.returncode}")
        return self._samples

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def background_load(load: Load) -> Iterator[Running]:
    running = Running(load)
    try:
        yield running
        running.samples()
    finally:
        running.end()


def run_load(load: Load) -> list[Sample]:
    with background_load(load) as running:
        return running.samples()


# ------------------------------------------------------------------------- the process


@dataclass
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def exchange(self, request: tuple[bytes, bytes]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer."""
        self.writer.writelines(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in head[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            body = b"".join([chunk async for chunk in self._chunks()])
        return int(head[0].split()[1]), headers, body

    async def _chunks(self) -> "Any":
        while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readuntil(b"\r\n")


class Generator:
    """Sends a load and keeps its samples."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.samples: list[Sample] = []
        self.stopped = asyncio.Event()
        self._idle: deque[Connection] = deque()
        self._room = asyncio.Semaphore(load.connections)
        self._numbers = itertools.count() if load.requests is None else iter(range(load.requests))
        bodies = [Path(body).read_bytes() for body in load.bodies]
        self._requests = [(self._head(len(body)), body) for body in bodies]

    def _head(self, length: int) -> bytes:
        headers = {"Host": self.load.address, **self.load.headers, "Content-Length": str(length)}
        lines = [f"POST {self.load.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    async def run(self) -> list[Sample]:
        ends = asyncio.get_running_loop().call_later(self.load.seconds, self.stopped.set)
        await (self._closed() if self.load.rate is None else self._open(self.load.rate))
        ends.cancel()
        return sorted(self.samples, key=lambda sample: sample.at)

    async def _closed(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.load.connections):
                tasks.create_task(self._one_after_another())

    async def _one_after_another(self) -> None:
        while not self.stopped.is_set() and (number := next(self._numbers, None)) is not None:
            await self._send(number, time.perf_counter())

    async def _open(self, rate: float) -> None:
        chance = random.Random(self.load.seed)
        due = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            while (number := next(self._numbers, None)) is not None:
                due += chance.expovariate(rate)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.stopped.wait(), max(due - time.perf_counter(), 0))
                if self.stopped.is_set():
                    break
                tasks.create_task(self._send(number, due))

    async def _send(self, number: int, due: float) -> None:
        body = number % len(self._requests)
        at = time.time() - (time.perf_counter() - due)
        status, headers, sha256 = BROKEN, dict[str, str](), ""
        async with self._room:
            connection = self._idle.pop() if self._idle else None
            try:
                async with asyncio.timeout(self.load.patience_s):
                    connection = connection or await self._connect()
                    status, headers, answer = await connection.exchange(self._requests[body])
                sha256 = hashlib.sha256(answer).hexdigest()
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                if connection is not None:
                    connection.writer.close()
            else:
                if headers.get("connection", "").lower() == "close":
                    connection.writer.close()
                else:
                    self._idle.append(connection)
        self.samples.append(Sample(at, time.perf_counter() - due, status, body, sha256, headers))

    async def _connect(self) -> Connection:
        host, _, port = self.load.address.rpartition(":")
        return Connection(*await asyncio.open_connection(host, int(port), limit=2**24))


async def _generate(load: Load) -> Iterable[Sample]:
    generator = Generator(load)
    loop = asyncio.get_running_loop()
    # The loop's own handlers end with it, and the samples are still to be written.
    signal.signal(signal.SIGTERM, lambda *_: loop.is_closed() or loop.call_soon_threadsafe(generator.stopped.set))
    return await generator.run()


def main() -> None:
    given: dict[str, Any] = json.load(sys.stdin)
    load = Load(**{**given, "bodies": tuple(given["bodies"])})
    gc.disable()
    samples = asyncio.run(_generate(load))
    sys.stdout.writelines(f"{json.dumps(asdict(sample))}\n" for sample in samples)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
