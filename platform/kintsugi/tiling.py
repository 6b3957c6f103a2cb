"""Cut an image that is too large for one pass into overlapping tiles and blend them back."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Tile = tuple[slice, slice]


def tiles(height: int, width: int, size: int, overlap: int) -> Iterator[Tile]:
    """Slices (rows, columns) of tiles at most `size` px a side that cover the image; neighbours share at
    least `overlap` px."""
    for top in _starts(height, size, overlap):
        for left in _starts(width, size, overlap):
            yield slice(top, min(top + size, height)), slice(left, min(left + size, width))


def run_tiled(run: Callable[[Tile], Tensor], like: Tensor, size: int, overlap: int) -> Tensor:
    """Blend `run(tile)` of every tile into one (N, C, H, W) tensor shaped as `like`.

    Tiles are weighted by a ramp that falls to nothing over `overlap` px towards their borders, so that no
    seam shows where two disagree.
    """
    total = torch.zeros_like(like)
    weights = like.new_zeros(1, 1, *like.shape[-2:])
    height, width = like.shape[-2:]
    for rows, columns in tiles(height, width, size, overlap):
        weight = _window(rows, columns, overlap, like)
        total[..., rows, columns] += run((rows, columns)) * weight
        weights[..., rows, columns] += weight
    return total / weights


def _starts(length: int, size: int, overlap: int) -> list[int]:
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


def _window(rows: slice, columns: slice, overlap: int, like: Tensor) -> Tensor:
    vertical, horizontal = (_ramp(part.stop - part.start, overlap, like) for part in (rows, columns))
    return vertical[:, None] * horizontal[None, :]


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    position = torch.arange(length, dtype=like.dtype, device=like.device)
    return (torch.minimum(position, length - 1 - position) + 1).clamp(max=max(1, overlap))
