"""What the members of a search's front do to the validation images: figures, and pictures of the worst."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from kintsugi.checkpoint import fetch_best
from kintsugi.data.dataset import open_split
from kintsugi.data.reader import SplitReader
from kintsugi.data.sample import RawSample
from kintsugi.errors import KintsugiError
from kintsugi.evaluation.report import difference, window
from kintsugi.evaluation.scorecard import ImageScore, Pictured, Scorecard, evaluate, pictured, worse_gain, worst_first
from kintsugi.metrics import align
from kintsugi.page import text
from kintsugi.pictures import overlay
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import ObjectStore
from kintsugi_tune.front import chosen, pareto_front, reference
from kintsugi_tune.record import SearchRecord, TrialRecord
from kintsugi_tune.values import trial_told

MEMBERS = 4
SIDE = 256
"""px: larger images are shown in a window of this size."""


@dataclass(frozen=True)
class Picture:
    """Floats in [0, 1]; `trial` restored it."""

    caption: str
    pixels: Any
    trial: int | None = None


@dataclass(frozen=True)
class Looked:
    """Scorecards over the same images by trial number, pictures of the worst images, and what could not be read.

    `strips` holds HTML that tells what is seen, and the pictures; `missing` says of what and why.
    """

    cards: dict[int, Scorecard] = field(default_factory=dict)
    strips: tuple[tuple[str, tuple[Picture, ...]], ...] = ()
    missing: dict[str, str] = field(default_factory=dict)


class _Spread(SplitReader):
    """Some of a split's samples, evenly over the whole split, which may be sorted by category."""

    def __init__(self, whole: SplitReader, count: int) -> None:
        super().__init__(whole.source)
        self._places = [place * len(whole) // count for place in range(min(count, len(whole)))]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def sample_ids(self) -> list[str]:  # type: ignore[override]
        return [super(_Spread, self).sample_ids[place] for place in self._places]

    def raw(self, index: int) -> RawSample:
        return super().raw(self._places[index])


def look(record: SearchRecord, store: ObjectStore, images: int, scored: int) -> Looked:
    """Restore validation images with the chosen member and the reference, and the worst with all members shown.

    Where the chosen member cannot be read, the next that can takes its place in choosing the images.
    """
    wanted = members_shown(record)
    if not wanted:
        return Looked()
    try:
        whole = open_split(store, record.config.data.dataset, "val")
    except KintsugiError as error:
        return Looked(missing={"the validation images": str(error)})
    reader = _Spread(whole, min(scored, len(whole)))
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="kintsugi-report-") as scratch:
        restorers = dict(_restorers(wanted, store, Path(scratch), missing))
    if not restorers:
        return Looked(missing=missing)
    best, base = chosen(record), reference(record)
    first = best.number if best and best.number in restorers else next(iter(restorers))
    numbers = [first, *([base.number] if base and base.number in restorers and base.number != first else [])]
    cards = {number: _card(record, restorers[number], reader, number) for number in numbers}
    worst = worst_first(cards[first].images)[:images]
    captions = {trial.number: _caption(trial, best) for trial in wanted}
    return Looked(cards, tuple(_strips(record, reader, worst, restorers, captions, first)), missing)


def members_shown(record: SearchRecord) -> list[TrialRecord]:
    """The chosen member, the ends of the front and what fits between them, in the front's order; then the reference."""
    front, best, base = pareto_front(record.trials), chosen(record), reference(record)
    if best is None:
        return []
    leading = {trial.number for trial in islice(_unlike([best, front[0], front[-1], *front]), MEMBERS)}
    shown = [trial for trial in front if trial.number in leading]
    return [*shown, *([base] if base and base.state == "complete" and base.number not in leading else [])]


def _unlike(trials: Sequence[TrialRecord]) -> Iterator[TrialRecord]:
    yield from {trial.number: trial for trial in trials}.values()


def _restorers(
    trials: Sequence[TrialRecord], store: ObjectStore, scratch: Path, missing: dict[str, str]
) -> Iterator[tuple[int, Restorer]]:
    for trial in trials:
        folder = scratch / str(trial.number)
        try:
            fetch_best(store, trial.run, folder)
            yield trial.number, Restorer.from_checkpoint(folder)
        except KintsugiError as error:
            missing[f"the checkpoint of trial {trial_told(trial)}"] = str(error)


def _card(record: SearchRecord, restorer: Restorer, reader: SplitReader, number: int) -> Scorecard:
    dataset = record.config.data.dataset
    return evaluate(restorer, reader, record.config, dataset=dataset, split="val", model=f"trial {number}")


def _strips(
    record: SearchRecord,
    reader: SplitReader,
    worst: Sequence[ImageScore],
    restorers: Mapping[int, Restorer],
    captions: Mapping[int, str],
    first: int,
) -> Iterator[tuple[str, tuple[Picture, ...]]]:
    drawn = {number: pictured(restorer, reader, record.config, worst) for number, restorer in restorers.items()}
    for each in zip(*drawn.values(), strict=True):
        yield _strip(dict(zip(drawn, each, strict=True)), captions, first)


def _strip(drawn: Mapping[int, Pictured], captions: Mapping[int, str], first: int) -> tuple[str, tuple[Picture, ...]]:
    base = drawn[first]
    restored = {number: align(picture.restored, base.clean) for number, picture in drawn.items()}
    shown, note = window(difference(restored[first], base.clean), base.mask, SIDE)
    pictures = (
        Picture("degraded", align(base.degraded, base.clean)[shown]),
        *(Picture(captions[number], pixels[shown], number) for number, pixels in restored.items()),
        Picture("clean", base.clean[shown]),
        Picture("labelled defect", overlay(base.clean, base.mask)[shown]),
    )
    score = base.score
    words = " · ".join((score.category, score.defect_type, f"trial {first} gains {worse_gain(score):+.2f} dB"))
    return f"<b>{text(score.sample_id)}</b> <small>{text(words)}</small>{note}", pictures


def _caption(trial: TrialRecord, best: TrialRecord | None) -> str:
    return f"trial {trial_told(trial)}{', chosen' if best and trial.number == best.number else ''}"
