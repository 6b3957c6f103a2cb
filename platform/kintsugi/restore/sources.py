"""What the Restorer reads: images and masks, whole or in bands of rows."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kintsugi.imaging import Image

Mask = NDArray[np.bool_]


class RowSource(Protocol):
    """An image that is read in bands: an `Image`, or a file that is too large to be held whole."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def channels(self) -> int: ...
    def rows(self, start: int, stop: int) -> Image: ...


class MaskSource(Protocol):
    """A mask that is read in bands of (rows, W) bool."""

    @property
    def size(self) -> tuple[int, int]: ...
    def mask_rows(self, start: int, stop: int) -> Mask: ...


@dataclass(frozen=True)
class WholeMask:
    """A mask in memory, (H, W) bool."""

    mask: Mask

    @property
    def size(self) -> tuple[int, int]:
        return self.mask.shape[0], self.mask.shape[1]

    def mask_rows(self, start: int, stop: int) -> Mask:
        return self.mask[start:stop] != 0
