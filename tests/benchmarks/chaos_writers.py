"""Writers of checkpoints that are killed while they upload; run as a program, one such writer."""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from rows import Row, measured

from kintsugi.errors import IntegrityError
from kintsugi.manifest import MANIFEST, Manifest, get_folder, put_folder
from kintsugi.storage import LocalStore

if TYPE_CHECKING:  # a writer starts without torch
    from kintsugi.config import ExperimentConfig

WAYS = {"manifest last": "== 0", "files in the order of their names": ">= 1"}
"""How a checkpoint is written, and how many torn ones are expected: the second is what shows that kills hit."""


def kill_writers(scratch: Path, config: "ExperimentConfig", kills: int, seed: int) -> list[Row]:
    """SIGKILL each of `kills` writers at a random moment of its second upload or the third, for both ways."""
    source = scratch / "writers-source"
    _write_checkpoint(config, source)
    rows: list[Row] = []
    for way, goal in WAYS.items():
        root, dice = scratch / f"writers-{len(rows)}", random.Random(seed)
        root.mkdir()
        hit = sum(_kill_one([way, str(source), str(root), str(number)], dice) for number in range(kills))
        whole, torn = _readable(LocalStore(root))
        note = f"{whole} whole ones were there"
        rows += [
            measured(f"writers killed within an upload, {way}", hit, f">= {kills}", n=kills),
            measured(f"torn checkpoints that a reader takes for whole, {way}", torn, goal, n=kills, note=note),
        ]
    return rows


def _write_checkpoint(config: "ExperimentConfig", folder: Path) -> None:
    from kintsugi.config import with_values
    from kintsugi.training.state import build_state

    wide = with_values(config, {"model.base": 32})
    build_state(wide, "0" * 64).save(folder, wide, {"epoch": 1, "score": 0.0}, {})


def _kill_one(words: list[str], dice: random.Random) -> bool:
    with subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seconds = float(process.stdout.readline())
        try:
            process.wait(dice.uniform(0, 2 * seconds))
        except subprocess.TimeoutExpired:
            process.kill()
    return process.returncode == -signal.SIGKILL


def _readable(store: LocalStore) -> tuple[int, int]:
    """Checkpoints with a manifest: how many are whole, and how many are not."""
    from kintsugi.checkpoint import load_checkpoint

    whole = torn = 0
    for info in store.list(""):
        if info.key.endswith(f"/{MANIFEST}"):
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    get_folder(store, info.key.removesuffix(f"/{MANIFEST}"), Path(scratch))
                    load_checkpoint(Path(scratch))
                    whole += 1
                except IntegrityError:
                    torn += 1
    return whole, torn


def write(way: str, source: Path, root: Path, number: str) -> None:
    """Upload one checkpoint after the other; say after the first how many seconds it took."""
    manifest = Manifest.model_validate_json((source / MANIFEST).read_bytes())
    for turn in count():
        started = time.monotonic()
        if way == "manifest last":
            put_folder(LocalStore(root), f"{number}-{turn}", source, manifest)
        else:
            (root / f"{number}-{turn}").mkdir()
            for path in sorted(source.iterdir()):
                shutil.copyfile(path, root / f"{number}-{turn}" / path.name)
        if not turn:
            print(time.monotonic() - started, flush=True)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
