from itertools import pairwise

import pytest
import torch

from kintsugi.restore.tiling import POSES, context, cores, inside, windows

LENGTHS = [1, 7, 64, 65, 129, 333, 1000]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("tile", "stride"), [(64, 1), (64, 16), (100, 16), (8, 16), (512, 64)])
def test_cores_cover_a_side_once_and_begin_on_the_grid(length: int, tile: int, stride: int) -> None:
    parts = list(cores(length, tile, stride))
    assert parts[0].start == 0 and parts[-1].stop == length
    assert all(before.stop == after.start for before, after in pairwise(parts))
    assert all(part.start % stride == 0 and part.stop - part.start <= max(tile, stride) for part in parts)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("flipped", [False, True])
def test_a_context_holds_its_core_and_halo_and_begins_on_the_grid(length: int, flipped: bool) -> None:
    for core in cores(length, 64, 16):
        seen = context(core, length, 40, 16, flipped)
        assert seen.start <= max(0, core.start - 40) and seen.stop >= min(length, core.stop + 40)
        assert seen.start >= 0 and seen.stop <= length
        assert (length - seen.stop if flipped else seen.start) % 16 == 0


def test_a_part_is_found_again_inside_what_was_seen() -> None:
    line = torch.arange(100)
    core, seen = slice(40, 60), slice(32, 80)
    assert torch.equal(line[seen][inside(core, seen)], line[core])


@pytest.mark.parametrize("length", LENGTHS)
def test_windows_lie_inside_the_image_and_are_few(length: int) -> None:
    parts = windows(length, 64, 16)
    assert 1 <= len(parts) <= 4
    assert all(0 <= part.start < part.stop <= length and part.start % 16 == 0 for part in parts)
    assert all(part.stop - part.start == min(length, 64) for part in parts)


@pytest.mark.parametrize(("ensemble", "count"), [("none", 1), ("flips", 4), ("dihedral", 8)])
def test_every_pose_is_another_one_and_can_be_undone(ensemble: str, count: int) -> None:
    image = torch.rand(2, 1, 5, 5)
    poses = POSES[ensemble]
    assert len({tuple(pose.apply(image).flatten().tolist()) for pose in poses}) == len(poses) == count
    oblong = torch.rand(2, 3, 4, 7)
    assert all(torch.equal(pose.undo(pose.apply(oblong)), oblong) for pose in poses)
