"""`kintsugi demo`: the whole path on this machine, by the commands that a user would type.

Every step is a `kintsugi` command of its own process; the demo only chooses ports, compares and reports.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kintsugi import local, processes
from kintsugi.demo_report import FIGURES, Outcome, write_report
from kintsugi.errors import KintsugiError, StackError, TrainingError
from kintsugi.storage import open_store, store_uri_from_environment

ROOMS = Path(__file__).resolve().parents[2]
CONFIG = ROOMS / "platform/configs/demo.yaml"
SPACE = ROOMS / "tune/spaces/restoration.yaml"
NAME = "demo"
NEEDED_GAIN = {"psnr": 3.0, "defect_psnr": 2.0}
"""dB over the degraded images that the restored ones must gain on average."""

_console = Console(highlight=False)


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack and the endpoint running.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the report and the picture.")] = Path("."),
) -> None:
    """Watch images with planted defects go through the whole machine, and come back with the defects."""
    started = time.monotonic()
    home = local.home_folder()
    if local.find(home) is not None:
        raise StackError("a local stack is up in this folder: run 'kintsugi down' first, the demo starts its own")
    output.mkdir(parents=True, exist_ok=True)
    try:
        outcome = _walk(home, output)
    finally:
        if not keep:
            _run("down")
    _show(outcome, output, time.monotonic() - started, keep)
    _check(outcome)


def _walk(home: Path, output: Path) -> Outcome:
    from kintsugi.data.synthetic import write_synthetic

    steps: list[tuple[str, float]] = []

    def step(title: str, *command: str) -> Any:
        begun = time.monotonic()
        answer = _run(*command, title=title)
        steps.append((title, time.monotonic() - begun))
        return answer

    step("Start an S3 server, a Ray head and TensorBoard", "up", *_free_ports(), "--cpus", "2")
    images = write_synthetic(home / "demo-images")
    step("Images to a dataset in S3", "data", "build", "pairs", str(images), "--name", NAME, "--json")
    step("Look at it", "data", "inspect", NAME, "--picture", str(output / "demo-dataset.png"), "--json")
    trained = step("Train on two workers (DDP)", "train", str(CONFIG), "--name", NAME, "--json")
    tuned = step(
        "Search loss weights, dropout and attention",
        *("tune", str(SPACE), "--config", str(CONFIG), "--name", NAME),
        *("--set", "train.steps_per_epoch=20", "--json"),
    )
    models = sorted([trained, tuned], key=lambda model: -model["score"])
    step("The best by validation score goes into production", "models", "promote", models[0]["model"])
    address = step("An autoscaling endpoint", "serve", "--model", f"{NAME}@production", "--json")["address"]
    begun = time.monotonic()
    _console.print("\n[bold]Restore held-out images over HTTP and from S3[/]")
    local.activate(home)
    scored, through_s3 = _restore_held_out(address, output)
    steps.append(("Restore held-out images over HTTP and from S3", time.monotonic() - begun))
    addresses = [*_run("status", "--json", quiet=True)]
    return Outcome(scored, models, models[0]["model"], through_s3, addresses, steps)


def _restore_held_out(address: str, output: Path) -> tuple[list[dict[str, Any]], int]:
    """Send every degraded test image over HTTP, some also by their S3 address, and score what comes back."""
    import httpx2 as httpx

    from kintsugi import imaging
    from kintsugi.config import load_config
    from kintsugi.data.dataset import open_split
    from kintsugi.data.loader import evaluation_pair
    from kintsugi.metrics import fidelity
    from kintsugi.pictures import overlay, picture_grid

    store = open_store(store_uri_from_environment())
    config, reader = load_config(CONFIG), open_split(store, NAME, "test")
    scored: list[dict[str, Any]] = []
    rows: dict[str, list[Any]] = {}
    through_s3 = 0
    with httpx.Client(base_url=address, timeout=60) as client:
        for index in range(len(reader)):
            sample = reader.sample(index)
            degraded, clean, mask = evaluation_pair(sample, config)
            body = imaging.encode(degraded)
            answer = client.post("/v1/restore", content=body)
            if answer.status_code != 200:
                raise KintsugiError(f"the endpoint answered {answer.status_code}: {answer.text}")
            restored = imaging.decode(answer.content)
            if (restored.size, restored.bit_depth) != (degraded.size, degraded.bit_depth):
                raise KintsugiError(f"{sample.sample_id} came back with another size or depth")
            if index % 5 == 0:
                _restore_through_s3(client, store, f"inputs/{sample.sample_id}.png", body, answer.content)
                through_s3 += 1
            reference = clean.to_unit()
            before, after = (fidelity(i.to_unit(), reference, mask).to_dict() for i in (degraded, restored))
            scored.append(
                {
                    "sample": sample.sample_id,
                    "category": sample.category,
                    "defect": sample.defect_type,
                    "retention": float(answer.headers["X-Kintsugi-Defect-Retention"]),
                    "degraded": {k: v for k, v in before.items() if v == v},
                    "restored": {k: v for k, v in after.items() if v == v},
                }
            )
            if mask.any() and sample.category not in rows:
                panels = [degraded.to_unit(), restored.to_unit(), reference, overlay(reference, mask)]
                rows[sample.category] = [f"{sample.category}\n{sample.defect_type}", *panels]
    picture_grid(
        [row[1:] for row in rows.values()],
        ["degraded", "restored", "clean", "planted defect"],
        [row[0] for row in rows.values()],
        output / "demo-before-after.png",
    )
    return scored, through_s3


def _restore_through_s3(client: Any, store: Any, key: str, body: bytes, expected: bytes) -> None:
    store.put(key, body)
    restored = key.replace("inputs/", "outputs/")
    request = {"input": f"{store.uri}/{key}", "output": f"{store.uri}/{restored}"}
    answer = client.post("/v1/restore/s3", json=request)
    if answer.status_code != 200:
        raise KintsugiError(f"the endpoint answered {answer.status_code} for {request['input']}: {answer.text}")
    if store.get(restored) != expected:
        raise KintsugiError(f"{restored} differs from the same image restored over HTTP")


def _run(*command: str, title: str = "", quiet: bool = False) -> Any:
    """Run one command, its output shown as it comes; the JSON document of its last line, if it has one."""
    if title:
        _console.print(f"\n[bold]{title}[/]\n[dim]$ kintsugi {shlex.join(command)}[/]")
    process = subprocess.Popen(
        [sys.executable, "-m", "kintsugi.cli", *command], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        if last and not quiet:
            _console.print(last, markup=False, soft_wrap=True)
        last = line.rstrip("\n")
    if process.wait() != 0:
        raise KintsugiError(f"'kintsugi {command[0]}' failed with exit code {process.returncode}: its words are above")
    try:
        return json.loads(last)
    except json.JSONDecodeError:
        if last and not quiet:
            _console.print(last, markup=False, soft_wrap=True)
        return None


def _free_ports() -> Sequence[str]:
    """The usual ports where they are free; any other where they are taken."""
    usual = {"s3": 8333, "dashboard": 8265, "tensorboard": 6006, "ray": 6379, "endpoint": 8000}
    return [part for name, port in usual.items() if not processes.is_free(port) for part in (f"--{name}-port", "0")]


def _show(outcome: Outcome, output: Path, seconds: float, keep: bool) -> None:
    table = Table("", "degraded", "restored", "gain", title=f"\n{len(outcome.images)} held-out images", box=None)
    for figure, (title, digits) in FIGURES.items():
        before, after = outcome.mean(figure, "degraded"), outcome.mean(figure, "restored")
        table.add_row(title, f"{before:.{digits}f}", f"{after:.{digits}f}", f"{after - before:+.{digits}f}")
    _console.print(table)
    for row in outcome.addresses:
        _console.print(f"{row['name']:12} {row['address']}", markup=False)
    report = write_report(outcome, output / "demo-report.html", output / "demo-before-after.png", seconds)
    _console.print(f"report       {report}\npicture      {output / 'demo-before-after.png'}", markup=False)
    left = (
        "everything still runs: 'kintsugi down' stops it" if keep else "all of it was stopped: --keep leaves it running"
    )
    _console.print(f"{seconds / 60:.1f} minutes; {left}", markup=False)


def _check(outcome: Outcome) -> None:
    for figure, needed in NEEDED_GAIN.items():
        if outcome.gain(figure) < needed:
            raise TrainingError(
                f"the restored images gain {outcome.gain(figure):.2f} dB {figure}, less than {needed} dB: "
                "look at the report, and at the curves with --keep"
            )
