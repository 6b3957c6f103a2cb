"""Cut an image that is too large for one pass so that nobody sees where it was cut.

A tile answers for its core and sees `halo` px more on every side that lies inside the image. Positions are
multiples of the model's stride, so that pixel-unshuffle, strided layers and pooling cells fall on the grid on
which they fall in the whole image. With a halo as wide as the model's reach a core's values then do not depend on
the cut, and nothing needs blending.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Ensemble = Literal["none", "flips", "dihedral"]


@dataclass(frozen=True)
class Pose:
    """One of the eight ways to lay an image down: flipped along its axes, then transposed."""

    rows: bool = False
    columns: bool = False
    transposed: bool = False

    def apply(self, batch: Tensor) -> Tensor:
        flipped = batch.flip([axis for axis, flip in ((-2, self.rows), (-1, self.columns)) if flip])
        return flipped.transpose(-2, -1) if self.transposed else flipped

    def undo(self, batch: Tensor) -> Tensor:
        turned = batch.transpose(-2, -1) if self.transposed else batch
        return turned.flip([axis for axis, flip in ((-2, self.rows), (-1, self.columns)) if flip])


_FLIPS = tuple(Pose(rows, columns) for rows in (False, True) for columns in (False, True))
POSES: dict[Ensemble, tuple[Pose, ...]] = {
    "none": (Pose(),),
    "flips": _FLIPS,
    "dihedral": (*_FLIPS, *(Pose(pose.rows, pose.columns, True) for pose in _FLIPS)),
}


def cores(length: int, tile: int, stride: int) -> Iterator[slice]:
    """Parts of a side, at most `tile` px (but at least `stride`) and about equal, that begin on the grid."""
    longest = max(stride, tile // stride * stride)
    count = -(-length // longest)
    side = -(-length // (count * stride)) * stride
    for start in range(0, length, side):
        yield slice(start, min(start + side, length))


def context(core: slice, length: int, halo: int, stride: int, flipped: bool = False) -> slice:
    """What a core's tile sees: on the grid, which with `flipped` begins at the other end of the side."""
    if flipped:
        mirrored = context(slice(length - core.stop, length - core.start), length, halo, stride)
        return slice(length - mirrored.stop, length - mirrored.start)
    start = max(0, (core.start - halo) // stride * stride)
    return slice(start, min(length, -(-(core.stop + halo) // stride) * stride))


def windows(length: int, window: int, stride: int, most: int = 4) -> list[slice]:
    """At most `most` parts of `window` px, spread evenly along a side, that begin on the grid."""
    if length <= window:
        return [slice(0, length)]
    count = min(most, max(1, round(length / window)))
    room = (length - window) // stride
    if count == 1:
        starts = [room // 2 * stride]
    else:
        starts = [i * room // (count - 1) * stride for i in range(count)]
    return [slice(start, start + window) for start in starts]


def inside(part: slice, whole: slice) -> slice:
    """`part` as seen from the start of `whole`."""
    return slice(part.start - whole.start, part.stop - whole.start)
