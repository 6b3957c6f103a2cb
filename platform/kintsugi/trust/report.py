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
        self._judged: list[tuple[slice, Trust]] = []

    def add(self, source: Image, restored: Image, error_bound: NDArray[np.float32] | None) -> None:
        """Take the next rows of the input and of the output, and the (rows, W) bound of its error."""
        self._waiting.append((source, restored, error_bound))
        while self._edges and sum(band.size[0] for band, _, _ in self._waiting) >= self._edges[0] - self._start:
            self._judge(self._edges.pop(0))

    def report(self) -> Report:
        """The report, once all rows were added."""
        assert not self._edges, "rows are missing"
        trusts = [trust for _, trust in self._judged]
        shares = [(rows.stop - rows.start) / self._start for rows, _ in self._judged]
        return Report(
            retention=min(trust.retention for trust in trusts),
            local_retention=min(trust.local_retention for trust in trusts),
            added=sum(share * trust.added for share, trust in zip(shares, trusts, strict=True)),
            removed=sum(share * trust.removed for share, trust in zip(shares, trusts, strict=True)),
            alarm_score=max(trust.alarm_score for trust in trusts),
            expected_error=max(trust.expected_error for trust in trusts),
            alarm=any(trust.alarm for trust in trusts),
            reasons=tuple(self._reasons()),
        )

    def _judge(self, stop: int) -> None:
        count, parts = stop - self._start, self._waiting
        whole = parts[0] if len(parts) == 1 else _stacked(parts)
        head, tail = _split(whole, count)
        self._waiting = [tail] if tail[0].size[0] else []
        before, after = head[0].to_unit(), head[1].to_unit()
        trust = judge(before, after, error_bound=head[2], limits=self._limits)
        self._judged.append((slice(self._start, stop), trust))
        self._start = stop

    def _reasons(self) -> list[str]:
        if len(self._judged) == 1:
            return list(self._judged[0][1].reasons)
        return [f"rows {rows.start} to {rows.stop}: {why}" for rows, trust in self._judged for why in trust.reasons]


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
