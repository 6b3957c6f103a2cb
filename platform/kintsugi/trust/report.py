"""The report of a restoration, taken block by block so that images too large to be held are judged too."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from kintsugi.errors import IntegrityError
from kintsugi.imaging import Image
from kintsugi.manifest import MANIFEST, Manifest, make_manifest
from kintsugi.storage import write_atomically
from kintsugi.trust.judge import InputProfile, Trust, TrustLimits, judge

BLOCK_PIXELS = 2**21
CALIBRATION = "trust.json"
_Part = tuple[Image, Image, NDArray[np.float32] | None]


class Calibration(BaseModel):
    """What was learned about a model after its training, kept as `trust.json` beside its weights.

    limits: where the alarm is raised. profile: which inputs it knows; without one it never abstains.
    error_scale: factor that makes its predicted error bounds hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    limits: TrustLimits = TrustLimits(min_retention=0.5)
    profile: InputProfile | None = None
    error_scale: float = 1.0


@dataclass(frozen=True)
class Report:
    """What a restoration did to its input, told without a clean original (see `trust.Trust`).

    Images of more than `BLOCK_PIXELS` are judged in blocks of rows: added and removed are shares of the whole
    image, the other figures those of the worst block, and rows in `reasons` count from the top of their block.

    Attributes:
        abstained: why the image came back untouched; None where it was restored.
    """

    retention: float
    local_retention: float
    added: float
    removed: float
    alarm_score: float
    expected_error: float
    alarm: bool
    reasons: tuple[str, ...] = ()
    abstained: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reasons": list(self.reasons)}


def untouched(reason: str) -> Report:
    """The report of an image that was left alone."""
    return Report(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, False, abstained=reason)


def read_calibration(folder: Path) -> Calibration:
    """The calibration in a checkpoint folder whose manifest has been checked; the default where it has none.

    Raises:
        IntegrityError: the file is broken, or the manifest does not know it.
    """
    path = folder / CALIBRATION
    if not path.exists():
        return Calibration()
    try:
        known = Manifest.model_validate_json((folder / MANIFEST).read_bytes()).files
        if CALIBRATION in known:
            return Calibration.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}): calibrate the model again") from error
    raise IntegrityError(f"{path} is not in the folder's manifest: calibrate the model again")


def save_calibration(folder: Path, calibration: Calibration) -> Manifest:
    """Add the calibration to a checkpoint folder, or replace it; the folder's digest changes."""
    write_atomically(folder / CALIBRATION, json.dumps(calibration.model_dump(), indent=1).encode())
    manifest = make_manifest(folder, "checkpoint")
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest


class Audit:
    """Collects restored rows from top to bottom and judges them.

    Blocks follow from the image's size alone: bands of any height give the same report.
    """

    def __init__(self, size: tuple[int, int], limits: TrustLimits) -> None:
        height, width = size
        # Equal blocks, for a thin last one could not be judged.
        count = max(1, min(-(-height * width // BLOCK_PIXELS), height // 64))
        self._edges = [round(i * height / count) for i in range(1, count + 1)]
        self._limits = limits
        self._start = 0
        self._waiting: list[_Part] = []
        self._judged: list[tuple[slice, Report]] = []

    def add(self, source: Image, restored: Image, error_bound: NDArray[np.float32] | None) -> None:
        """Take the next rows of the input and of the output, and the (rows, W) bound of its error."""
        self._waiting.append((source, restored, error_bound))
        while self._edges and sum(map(_height, self._waiting)) >= self._edges[0] - self._start:
            self._judge(self._edges.pop(0))

    def report(self) -> Report:
        """The report, once all rows were added."""
        assert not self._edges, "rows are missing"
        blocks = [block for _, block in self._judged]
        shares = [(rows.stop - rows.start) / self._start for rows, _ in self._judged]
        return Report(
            retention=min(block.retention for block in blocks),
            local_retention=min(block.local_retention for block in blocks),
            added=sum(share * block.added for share, block in zip(shares, blocks, strict=True)),
            removed=sum(share * block.removed for share, block in zip(shares, blocks, strict=True)),
            alarm_score=max(block.alarm_score for block in blocks),
            expected_error=max(block.expected_error for block in blocks),
            alarm=any(block.alarm for block in blocks),
            reasons=tuple(self._reasons()),
        )

    def _judge(self, stop: int) -> None:
        source, restored, bound = self._take(stop - self._start)
        trust = judge(source.to_unit(), restored.to_unit(), error_bound=bound, limits=self._limits)
        self._judged.append((slice(self._start, stop), _without_map(trust)))
        self._start = stop

    def _take(self, rows: int) -> _Part:
        """The first rows of those that wait; only where they lie in several bands are they copied."""
        parts: list[_Part] = []
        while rows:
            head, tail = _split(self._waiting.pop(0), rows)
            parts.append(head)
            rows -= _height(head)
            if _height(tail):
                self._waiting.insert(0, tail)
        return parts[0] if len(parts) == 1 else _stacked(parts)

    def _reasons(self) -> list[str]:
        if len(self._judged) == 1:
            return list(self._judged[0][1].reasons)
        return [f"rows {rows.start} to {rows.stop}: {why}" for rows, block in self._judged for why in block.reasons]


def _without_map(trust: Trust) -> Report:
    """What is kept of a block: 4 bytes a pixel of its map would grow with the image."""
    return Report(
        trust.retention,
        trust.local_retention,
        trust.added,
        trust.removed,
        trust.alarm_score,
        trust.expected_error,
        trust.alarm,
        trust.reasons,
    )


def _height(part: _Part) -> int:
    return part[0].size[0]


def _stacked(parts: list[_Part]) -> _Part:
    sources, restored, bounds = zip(*parts, strict=True)
    known = [bound for bound in bounds if bound is not None]
    return (_joined(sources), _joined(restored), np.concatenate(known) if known else None)


def _joined(bands: Sequence[Image]) -> Image:
    return replace(bands[0], pixels=np.concatenate([band.pixels for band in bands]))


def _split(part: _Part, rows: int) -> tuple[_Part, _Part]:
    source, restored, bound = part
    head = source.rows(0, rows), restored.rows(0, rows), None if bound is None else bound[:rows]
    tail = (
        source.rows(rows, source.size[0]),
        restored.rows(rows, source.size[0]),
        None if bound is None else bound[rows:],
    )
    return head, tail
