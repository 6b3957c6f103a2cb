"""Large TIFFs unpacked by processes that may die of them, and the room on the disk that it takes."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from kintsugi.errors import Abandoned, ImageError
from kintsugi.storage import sha256
from kintsugi_serve.decoding.scratch import scratch_folder
from kintsugi_serve.decoding.strips import Limits, Question, unpack


def _unpacked(tmp_path: Path, data: bytes, **limits: Any) -> ImageError:
    source = tmp_path / "large"
    source.write_bytes(data)
    (tmp_path / "rows").unlink(missing_ok=True)
    with pytest.raises(ImageError) as caught:
        unpack(Question(source, sha256(data)), tmp_path / "rows", Limits(**{"max_pixels": 10**6, **limits}))
    return caught.value


def _claiming(path: Path, **tags: int) -> bytes:
    """A small TIFF whose header says something else."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    tifffile.imwrite(path, noise, photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name, value in tags.items():
            tiff.pages.first.tags[name].overwrite(value)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"ImageWidth": 60000, "ImageLength": 60000}, "too_large"),
        ({"ImageLength": 15000}, "undecodable"),
        ({"RowsPerStrip": 1}, "undecodable"),
    ],
)
def test_a_header_that_claims_what_is_not_there_costs_nothing(tmp_path: Path, tags: dict[str, int], code: str) -> None:
    assert _unpacked(tmp_path, _claiming(tmp_path / "claims.tif", **tags)).code == code
    assert not (tmp_path / "rows").exists() or (tmp_path / "rows").stat().st_size == 0


def test_rows_too_wide_or_too_many_bytes_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "wide.tif", np.zeros((2, 2**16 + 1), np.uint8), photometric="minisblack")
    wide = _unpacked(tmp_path, (tmp_path / "wide.tif").read_bytes())
    assert wide.code == "too_large" and "turn the image" in str(wide)
    tifffile.imwrite(tmp_path / "long.tif", np.zeros((300, 100), np.uint16), photometric="minisblack", compression=8)
    long = _unpacked(tmp_path, (tmp_path / "long.tif").read_bytes(), max_bytes=50_000)
    assert long.code == "too_large" and "60000 bytes of pixels" in str(long)


@pytest.mark.parametrize("verb", ["crash", "spin", "babble", "exceed"])
def test_an_image_that_ends_its_process_twice_is_not_tried_again(
    tmp_path: Path, hostile_strips: str, verb: str
) -> None:
    image = b"II*\0" + verb.encode()
    limits = {"target": hostile_strips, "ledger": tmp_path / "ledger", "decode_timeout_s": 1}
    found = [_unpacked(tmp_path, image, **limits) for _ in range(3)]
    assert [error.code for error in found] == ["undecodable", "undecodable", "poison"]


def test_a_child_writes_no_more_than_it_announced(tmp_path: Path, hostile_strips: str) -> None:
    (tmp_path / "large").write_bytes(b"II*\0flood")
    unpack(Question(tmp_path / "large", "0" * 64), tmp_path / "rows", Limits(target=hostile_strips))
    assert (tmp_path / "rows").stat().st_size == 64


def test_a_child_whose_image_nobody_waits_for_is_ended(tmp_path: Path, hostile_strips: str) -> None:
    (tmp_path / "large").write_bytes(b"II*\0spin")
    limits = Limits(target=hostile_strips, ledger=tmp_path / "ledger", decode_timeout_s=3600)
    with pytest.raises(Abandoned):
        unpack(Question(tmp_path / "large", "0" * 64), tmp_path / "rows", limits, stop=lambda: True)
    assert not (tmp_path / "ledger").exists()


def test_an_image_that_eats_memory_is_refused(tmp_path: Path, hostile_strips: str) -> None:
    assert _unpacked(tmp_path, b"II*\0nibble", target=hostile_strips, decode_timeout_s=60).code in (
        "undecodable",
        "too_large",
    )


def test_scratch_that_a_killed_process_left_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "rows").write_bytes(b"x")
    (tmp_path / "held").mkdir()
    held = os.open(tmp_path / "held", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with scratch_folder(tmp_path) as folder, scratch_folder(tmp_path) as other:
        assert {path.name for path in tmp_path.iterdir()} == {"held", folder.name, other.name}
    assert [path.name for path in tmp_path.iterdir()] == ["held"]
    os.close(held)


def test_who_reads_strips_loads_no_torch() -> None:
    code = "import sys, kintsugi_serve.decoding.strips_child; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
