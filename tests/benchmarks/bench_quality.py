"""Restoration on real tiles: classical methods and checkpoints, measured by kintsugi's own metrics.

    make bench-quality ARGS="--limit 20 --methods degraded nlm"

Prints its rows and writes them to .kintsugi/bench/quality.json; the survival curves lie beside it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import cv2
import torch
from quality_judge import Bench, Judged, Setting, Task, judge_all
from quality_methods import METHODS, blind_non_local_means
from quality_rows import SETS, Maker
from quality_tiles import Tiles
from rows import Row, print_table, write_rows

from kintsugi.data.degradation import PRESETS
from kintsugi.detection.detectability import Map, measure_detectability
from kintsugi.detection.detector import defect_map
from kintsugi.detection.segmenter import Segmenter, train_detector
from kintsugi.errors import KintsugiError
from kintsugi.evaluation.survival import SurvivalCurve, draw_survival, measure_survival
from kintsugi.imaging import Image
from kintsugi.sections import Split
from kintsugi.storage import write_atomically

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
DETECTOR = CHECKPOINTS / "detector"
PLANTED = ("kla", "noise")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        rows = _run(options)
    except KintsugiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(rows)
    write_rows(rows, options.output)
    print(f"rows: {options.output}")
    return 0


def _run(options: argparse.Namespace) -> list[Row]:
    if not (options.folder / "manifest.csv").is_file():
        return [Row("quality", None, note=f"skipped: {options.folder} holds no tiles; name a folder that does")]
    setting = _setting(options)
    chosen = _methods(options, setting)
    tiles = Tiles(setting.folder, setting.split, setting.limit)
    maker = Maker(frozenset(setting.checkpoints), _shortened(options, tiles))
    finder = _Finder(Bench(setting))
    rows: list[Row] = []
    for preset, where in SETS.items():
        degraded = finder.degraded_maps(preset)
        for method in chosen:
            tasks = [Task(index, preset, method) for index in range(len(tiles))]
            print(f"{method} on {where}: {len(tasks)} images", file=sys.stderr, flush=True)
            outputs = list(judge_all(setting, tasks, options.processes))
            rows += maker.fidelity(method, where, outputs)
            if preset is None:
                rows.append(maker.clean_input(method, outputs))
            rows += finder.rows(maker, method, where, degraded, outputs)
    return rows + _planted(options, setting, chosen, maker)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT.parent / "shared" / "data" / "mt")
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--limit", type=int, help="so many images, spread over the split")
    parser.add_argument("--methods", nargs="+", help="of those that there are; default all")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FOLDER", help="one more model")
    parser.add_argument("--detector", default=DETECTOR, help="a folder or package.module:attribute")
    parser.add_argument("--train-detector", type=int, metavar="STEPS", help="train one where there is none")
    parser.add_argument("--survival-images", type=int, default=12, help="0 leaves planted spots out")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / ".kintsugi" / "bench" / "quality.json")
    return parser.parse_args(arguments)


def _setting(options: argparse.Namespace) -> Setting:
    checkpoints = {path.parent.name: path.parent for path in sorted(CHECKPOINTS.glob("*/config.yaml"))}
    for given in options.checkpoint:
        name, _, folder = given.partition("=")
        checkpoints[name] = Path(folder)
    return Setting(options.folder, options.split, options.limit, checkpoints, _detector(options))


def _methods(options: argparse.Namespace, setting: Setting) -> list[str]:
    known = [*METHODS, *setting.checkpoints]
    unknown = set(options.methods or ()) - set(known)
    if unknown:
        raise KintsugiError(f"there is no method {', '.join(sorted(unknown))}: choose of {', '.join(known)}")
    return [name for name in known if name in (options.methods or known)]


def _detector(options: argparse.Namespace) -> str | None:
    """The detector to use; trained now if that was asked for and there is none."""
    named = str(options.detector)
    if ":" in named or Path(named).is_dir():
        return named
    if not options.train_detector:
        return None
    trained = train_detector(
        Tiles(options.folder, "train"),
        Tiles(options.folder, "val"),
        steps=options.train_detector,
        trained_on=f"clean images of the train split of {options.folder.name}",
        progress=lambda step, loss: step % 100 or print(f"detector step {step}: {loss:.3f}", file=sys.stderr),
    )
    folder = options.output.parent / "detector"
    trained.save(folder)
    return str(folder)


class _Finder:
    """The detector's view of the tiles; without a detector it says so in its rows."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        samples = [bench.tiles.sample(index) for index in range(len(bench.tiles))]
        self.masks = [sample.mask if sample.mask_known else None for sample in samples]
        self.clean = self._maps(sample.clean for sample in samples)

    def degraded_maps(self, preset: str | None) -> list[Map]:
        return self._maps(self.bench.tiles.trial(index, preset).degraded for index in range(len(self.bench.tiles)))

    def rows(self, maker: Maker, method: str, where: str, degraded: list[Map], outputs: list[Judged]) -> list[Row]:
        after = [output.map for output in outputs if output.map is not None]
        if not after:
            absent = "no detector: name one, or let one be trained with --train-detector STEPS"
            return [maker.row(method, where, "detectability recovered", None, "", 0, absent)]
        free, parts = [output.good for output in outputs], [output.group for output in outputs]
        found = measure_detectability(self.clean, degraded, after, self.masks, free, groups=parts)
        return maker.detectability(method, where, found, self._said)

    def _maps(self, images: Iterable[Image]) -> list[Map]:
        detector = self.bench.detector
        return [] if detector is None else [defect_map(detector, image) for image in images]

    @property
    def _said(self) -> str:
        detector = self.bench.detector
        if not isinstance(detector, Segmenter):
            return "the user's own detector"
        return f"detector's AP on clean val images {detector.card.val_average_precision or 0:.2f}"


def _planted(options: argparse.Namespace, setting: Setting, chosen: list[str], maker: Maker) -> list[Row]:
    if not options.survival_images:
        return []
    bench = Bench(setting)
    images = _defect_free(bench.tiles, options.survival_images)
    methods: dict[str, Callable[[Image], Image]] = {"nlm, blind": blind_non_local_means}
    methods |= {name: partial(bench.restore, name) for name in chosen if name in setting.checkpoints}
    rows: list[Row] = []
    drawn: dict[str, dict[str, object]] = {}
    for preset in PLANTED:
        curves: dict[str, SurvivalCurve] = {}
        for name, restore in methods.items():
            print(f"{name} on planted spots, {preset}: {len(images)} images", file=sys.stderr, flush=True)
            curves[name] = measure_survival(images, PRESETS[preset], restore)
        rival = curves["nlm, blind"]
        for name, curve in curves.items():
            rows += maker.survival(name, preset, curve, None if curve is rival else rival)
        drawn[preset] = {name: curve.model_dump() for name, curve in curves.items()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        picture = draw_survival(curves, f"planted spots, preset {preset}")
        write_atomically(options.output.with_name(f"{options.output.stem}-survival-{preset}.png"), picture)
    curves_file = options.output.with_name(f"{options.output.stem}-survival.json")
    write_atomically(curves_file, json.dumps(drawn, indent=1).encode())
    return rows


def _defect_free(tiles: Tiles, count: int) -> list[tuple[str, Image]]:
    """The largest in which most spots find room, one of each part."""
    best: dict[str, tuple[int, str, Image]] = {}
    for index in range(len(tiles)):
        sample = tiles.sample(index)
        if sample.defect_type == "good":
            found = (sample.clean.size[0] * sample.clean.size[1], sample.sample_id, sample.clean)
            best[sample.part_id] = max(best.get(sample.part_id, found), found, key=lambda item: item[:2])
    return [(name, image) for _, name, image in sorted(best.values(), key=lambda item: item[:2])[::-1][:count]]


def _shortened(options: argparse.Namespace, tiles: Tiles) -> str:
    if len(tiles) == tiles.total:
        return "" if options.split == "test" else f"{options.split} split"
    return f"shortened: {len(tiles)} of {tiles.total} {options.split} images"


if __name__ == "__main__":
    sys.exit(main())
