"""What a compiled network or an exported graph would save, against the plain one that the service runs.

    .venv/bin/python tests/benchmarks/bench_graph.py --model FOLDER --device cuda

Prints its rows and writes them to .kintsugi/bench/graph.json. Takes turns, so that all see the same machine.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from rows import Row, output_of, print_table, write_rows

from kintsugi.export.writer import export_model
from kintsugi.restore.restorer import Restorer, shipped_weights

Way = Callable[[], NDArray[np.float32]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: the shipped weights")
    parser.add_argument("--side", type=int, default=256, help="of the images, px")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = measure(options.model or shipped_weights(), options)
    print_table(rows)
    write_rows(rows, output_of("graph"))
    return 0


def measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    plain = Restorer.from_checkpoint(folder, options.device).model
    shape = (1, plain.config.channels, options.side, options.side)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Way] = {"plain": running(plain, image, options.device)}
    ready: dict[str, float] = {}
    for name, made in {"torch.compile": compiled, "onnxruntime": exported}.items():
        if name == "onnxruntime" and options.device != "cpu":
            continue
        begun = time.perf_counter()
        ways[name] = made(folder, plain, image, options)
        ways[name]()
        ready[name] = time.perf_counter() - begun
    spent = take_turns(ways, options.repeats)
    return [row for name in ready for row in rows_of(name, ways, spent, ready[name], options)]


def running(model: torch.nn.Module, image: torch.Tensor, device: str) -> Way:
    layout = torch.channels_last if device == "cpu" else torch.contiguous_format
    given = image.to(device).contiguous(memory_format=layout)

    @torch.inference_mode()
    def run() -> NDArray[np.float32]:
        return model(given, None).image.cpu().numpy()

    return run


def compiled(folder: Path, plain: torch.nn.Module, image: torch.Tensor, options: argparse.Namespace) -> Way:
    model = copy.deepcopy(plain)
    model.compile(dynamic=True)
    return running(model, image, options.device)


def exported(folder: Path, plain: torch.nn.Module, image: torch.Tensor, options: argparse.Namespace) -> Way:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        export_model(folder, path, "bench")
        session = onnxruntime.InferenceSession(path, settings)
    name, given = session.get_inputs()[0].name, image.numpy()
    return lambda: session.run(None, {name: given})[0]


def take_turns(ways: dict[str, Way], repeats: int) -> dict[str, list[float]]:
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            spent[name].append(time.perf_counter() - begun)
    return spent


def rows_of(
    name: str, ways: dict[str, Way], spent: dict[str, list[float]], ready_s: float, options: argparse.Namespace
) -> list[Row]:
    ratio = median(a / b for a, b in zip(spent["plain"], spent[name], strict=True))
    apart = 255 * float(np.abs(ways[name]() - ways["plain"]()).max())
    times = f"{1000 * median(spent[name]):.1f} and {1000 * median(spent['plain']):.1f} ms"
    told = f"{options.side} x {options.side} px on {options.device}, {options.threads} thread(s): {times}"
    return [
        Row(f"{name}: speed, of the plain network's", ratio, n=options.repeats, note=told),
        Row(f"{name}: until its first answer", ready_s, "s", n=1),
        Row(f"{name}: difference", apart, "", n=1, note="levels of 255, the largest"),
    ]


if __name__ == "__main__":
    sys.exit(main())
