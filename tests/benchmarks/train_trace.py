"""Writes down, from inside the workers of a run, which samples each step was trained on.

Every line of the file that `KINTSUGI_TRACE` names is one JSON object: a step of one worker, a checkpoint within an
epoch, or the metrics of an epoch. What is trained, and how, stays the product's own.
"""

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from kintsugi.data.loader import EpochKeys
from kintsugi.training import launch, loop

VARIABLE = "KINTSUGI_TRACE"


def worker_loop(payload: dict[str, Any]) -> None:
    """Stands in for `launch._worker_loop`."""
    install()
    launch._worker_loop(payload)


def install() -> None:
    """Wrap the loop's step, the sampler and the reports."""
    handed: deque[Any] = deque()
    keys, step, report, save = EpochKeys.__iter__, loop._Epochs._step, launch._Reporter.__call__, launch._Reporter.save

    @wraps(keys)
    def traced_keys(self: Any) -> Iterator[Any]:
        handed.clear()
        for key in keys(self):
            handed.append(key)
            yield key

    @wraps(step)
    def traced_step(self: Any, state: Any, config: Any, parts: list[int], batches: Any) -> Any:
        at = state.step
        sums = step(self, state, config, parts, batches)
        size = config.data.batch_size // (config.train.workers * config.train.micro_batches)
        samples = [[handed.popleft() for _ in range(size)] for _ in parts]
        worker = self.worker
        write(
            kind="step", epoch=state.epoch, step=at, rank=worker.rank, world=worker.world, parts=parts, samples=samples
        )
        return sums

    @wraps(report)
    def traced_report(self: Any, metrics: Mapping[str, float], state: Any) -> None:
        write(kind="epoch", rank=self._rank, metrics=dict(metrics))
        report(self, metrics, state)

    @wraps(save)
    def traced_save(self: Any, state: Any) -> None:
        save(self, state)
        write(kind="saved", rank=self._rank, epoch=state.epoch, step=state.step)

    EpochKeys.__iter__, loop._Epochs._step = traced_keys, traced_step
    launch._Reporter.__call__, launch._Reporter.save = traced_report, traced_save


def write(**line: Any) -> None:
    line |= {"pid": os.getpid(), "time": time.time()}
    # One write of less than a page to a file opened for appending is never torn by another process.
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a killed writer may leave half a line at the end."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
