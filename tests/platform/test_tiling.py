from itertools import pairwise

import pytest
import torch

from kintsugi.tiling import run_tiled, tiles


@pytest.mark.parametrize(("height", "width"), [(10, 10), (64, 64), (65, 200), (129, 1), (333, 97)])
def test_tiles_cover_every_pixel_and_never_exceed_their_size(height: int, width: int) -> None:
    covered = torch.zeros(height, width)
    for rows, columns in tiles(height, width, 64, 16):
        assert rows.stop - rows.start <= 64 and columns.stop - columns.start <= 64
        covered[rows, columns] += 1
    assert covered.min() >= 1


def test_neighbouring_tiles_share_at_least_the_overlap() -> None:
    starts = sorted({rows.start for rows, _ in tiles(301, 10, 64, 16)})
    assert all(after - before <= 64 - 16 for before, after in pairwise(starts))


def test_the_identity_comes_back_unchanged() -> None:
    image = torch.rand(2, 3, 150, 90)
    assert torch.allclose(run_tiled(lambda tile: image[..., tile[0], tile[1]], image, 64, 16), image, atol=1e-6)


def test_tiles_that_disagree_are_blended_without_a_step() -> None:
    like = torch.zeros(1, 1, 8, 112)
    values = iter([0.0, 1.0])
    blended = run_tiled(lambda tile: torch.full((1, 1, 8, 64), next(values)), like, 64, 16)
    assert blended[0, 0, 0].diff().abs().max() < 0.1
