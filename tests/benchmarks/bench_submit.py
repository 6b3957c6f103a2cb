"""How long does it take from `kintsugi submit` to the first line of the job's log, and to the command's own first line?

    python tests/benchmarks/bench_submit.py --repeats 10

On a local stack of its own with its store in a folder. The first job, which brings code and config to the cluster, is
told apart: for the others the cluster is warm. Times are from the start of the `kintsugi` process, as a user
waits for them. Rows are printed and written to .kintsugi/bench/bench-submit.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from rows import ROOT, Row, measured, output_of, print_table, write_rows

FULL = 10
OURS = "[]"
"""What `models list --json` prints of an empty store."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench-submit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=FULL, help="so many jobs after the first")
    parser.add_argument("--output", type=Path, default=output_of("bench-submit"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kintsugi-") as scratch, stack(Path(scratch)) as environment:
        first, *warm = [submit(environment) for _ in range(1 + options.repeats)]
    rows = list(_rows(first, warm))
    print_table(rows)
    write_rows(rows, options.output)
    return 0


@contextmanager
def stack(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a stack that ends with the block."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_", "KINTSUGI_"))}
    environment = {**kept, "KINTSUGI_HOME": str(folder / "home"), "KINTSUGI_STORE": str(folder / "store")}
    (folder / "store").mkdir()
    ports = [part for name in ("dashboard", "tensorboard", "ray", "endpoint") for part in (f"--{name}-port", "0")]
    try:
        subprocess.run(_kintsugi("up", *ports), env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        yield environment
    finally:
        subprocess.run(_kintsugi("down"), env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def submit(environment: dict[str, str]) -> tuple[float, float]:
    """Seconds from the start of the process to the first line of the log, and to the first that the command wrote."""
    begun = time.monotonic()
    words = _kintsugi("submit", "--", "models", "list", "--json")
    with subprocess.Popen(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [(time.monotonic() - begun, line.strip()) for line in process.stdout]
    if process.returncode:
        raise SystemExit(f"a job ended with {process.returncode}")
    return seen[0][0], next(seconds for seconds, line in seen if line == OURS)


def _rows(first: tuple[float, float], warm: Sequence[tuple[float, float]]) -> Iterator[Row]:
    note = f"load {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    note += "" if len(warm) >= FULL else f"; shortened from {FULL} jobs"
    yield Row("submit to first log line, first job of a cluster", first[0], "s", n=1)
    yield Row("submit to the command's first line, first job of a cluster", first[1], "s", n=1)
    for index, what in enumerate(("first log line", "the command's first line")):
        seconds = [times[index] for times in warm]
        yield Row(f"submit to {what}, warm, median", median(seconds), "s", n=len(seconds), note=note)
        yield measured(f"submit to {what}, warm, slowest", max(seconds), "<= 20", unit="s", n=len(seconds), note=note)


def _kintsugi(*words: str) -> list[str]:
    return [sys.executable, "-m", "kintsugi.cli", *words]


if __name__ == "__main__":
    sys.exit(main())
