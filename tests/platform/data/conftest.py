"""Folders in the layouts of others, written as they would be found."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kintsugi.imaging import Image, encode, encode_mask

SIZE = (24, 32)


def _picture(seed: int, *, size: tuple[int, int] = SIZE, bits: int = 8, colour: bool = False) -> Image:
    level = 2**bits - 1
    shape = (*size, 3) if colour else size
    pixels = np.random.default_rng(seed).integers(0, level, shape, endpoint=True)
    return Image(pixels.astype(np.uint8) if bits == 8 else pixels.astype(np.uint16), "png", level)


def _spot(size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, np.bool_)
    mask[4:9, 10:14] = True
    return mask


@pytest.fixture
def picture() -> Callable[..., Image]:
    """Makes a random image from a seed; `size` is (height, width)."""
    return _picture


@pytest.fixture
def spot() -> np.ndarray:
    """A mask of 20 px for an image of the usual size."""
    return _spot()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Image | np.ndarray | bytes], None]:
    """Writes an image, a mask or plain bytes below `tmp_path`."""

    def write_one(name: str, content: Image | np.ndarray | bytes) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image):
            content = encode(content)
        path.write_bytes(content if isinstance(content, bytes) else encode_mask(content))

    return write_one


@pytest.fixture
def pairs(tmp_path: Path, write: Callable[..., None]) -> Callable[..., Path]:
    """Makes a folder of the layout `pairs`: as many parts as asked, of one scratched and one good image each."""

    def make(parts: int = 6, *, folder: str = "pairs", bits: int = 8, colour: bool = False) -> Path:
        rows = ["name,part,category,defect_type"]
        for part in range(parts):
            for shot, kind in enumerate(("scratch", "good")):
                name = f"p{part:02d}-{shot}"
                write(f"{folder}/clean/{name}.png", _picture(10 * part + shot, bits=bits, colour=colour))
                write(f"{folder}/mask/{name}_mask.png", _spot() if kind == "scratch" else np.zeros(SIZE, np.bool_))
                rows.append(f"{name},p{part:02d},steel,{kind}")
        (tmp_path / folder / "manifest.csv").write_text("\n".join(rows))
        return tmp_path / folder

    return make
