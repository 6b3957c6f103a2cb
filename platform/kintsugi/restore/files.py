"""Restore a file to a file: in memory, or as strips where a TIFF is large."""

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kintsugi import imaging
from kintsugi.errors import ConfigError, ImageError, StoreError
from kintsugi.imaging import Image
from kintsugi.restore.restorer import Band, MaskSource, Restorer, WholeMask
from kintsugi.restore.strips import TiffStrips, write_strips
from kintsugi.storage import write_atomically
from kintsugi.trust.report import Report

Progress = Callable[[int, int], None]
STREAM_ABOVE = 2**24
"""Pixels of a TIFF from which on it is read and written in strips."""
_READABLE = 2**30


def restore_file(
    restorer: Restorer,
    source: Path,
    target: Path,
    *,
    mask: Path | None = None,
    white_level: int | None = None,
    defect_map: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Restore `source` into `target`, which appears when it is whole, in the same format.

    Args:
        mask: an image of known defects: every value but 0.
        defect_map: where to write the predicted probability of a defect as 8-bit grey, PNG or TIFF.
        progress: called with the rows done and all rows where the image passes in strips.

    Raises:
        ImageError: the image or the mask is not one that is restored.
        ConfigError: the model predicts no defect map, or the map's name says no format.
        StoreError: a file cannot be read or written.
    """
    if defect_map is not None:
        _check_map(restorer, defect_map)
    with contextlib.ExitStack() as opened, _named(source, target):
        strips = _open_large(source, white_level)
        if isinstance(strips, Image):
            return _restore_whole(restorer, strips, target, mask, defect_map)
        opened.enter_context(strips)
        shown = _open_mask(mask, opened)
        return _restore_in_strips(restorer, strips, target, shown, defect_map, progress)


def read_file(path: Path) -> bytes:
    """The bytes of a file that a user named."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}): check the path") from error


def _open_large(path: Path, white_level: int | None) -> TiffStrips | Image:
    """A large TIFF as strips, every other image whole."""
    if not _is_tiff(path):
        return imaging.decode(read_file(path), white_level=white_level)
    try:
        strips = TiffStrips(path, white_level=white_level)
    except ImageError as refused:
        if path.stat().st_size > _READABLE:
            raise
        try:
            return imaging.decode(read_file(path), white_level=white_level)
        except ImageError as error:
            raise (refused if error.code == "too_large" else error) from error
    height, width = strips.size
    if height * width > STREAM_ABOVE:
        return strips
    with strips:
        return imaging.decode(read_file(path), white_level=white_level)


def _open_mask(path: Path | None, opened: contextlib.ExitStack) -> MaskSource | None:
    if path is None:
        return None
    if _is_tiff(path):
        return opened.enter_context(TiffStrips(path))
    return WholeMask(imaging.decode_mask(read_file(path)))


def _is_tiff(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}): check the path") from error


def _restore_whole(
    restorer: Restorer, image: Image, target: Path, mask: Path | None, defect_map: Path | None
) -> Report:
    shown = None if mask is None else imaging.decode_mask(read_file(mask))
    answer = restorer.restore(image, shown)
    write_atomically(target, imaging.encode(answer.image))
    if defect_map is not None and answer.defect_map is not None:
        grey = Image(_as_grey(answer.defect_map), _map_format(defect_map))
        write_atomically(defect_map, imaging.encode(grey))
    return answer.report


def _restore_in_strips(
    restorer: Restorer,
    strips: TiffStrips,
    target: Path,
    mask: MaskSource | None,
    defect_map: Path | None,
    progress: Progress | None,
) -> Report:
    height, width = strips.size
    if defect_map is not None and _map_format(defect_map) == "png" and height * width > imaging.MAX_PIXELS:
        raise ConfigError(f"a defect map of {width} x {height} px is too large for a PNG: name it with .tiff")
    like = strips.rows(0, 1)
    with tempfile.TemporaryFile() as scratch:

        def keep(band: Band) -> None:
            if band.defect_map is not None:
                scratch.write(_as_grey(band.defect_map).tobytes())

        report = restorer.restore_strips(
            strips,
            lambda bands: write_strips(target, like, height, bands),
            mask,
            progress=progress,
            maps=keep if defect_map is not None else None,
        )
        if defect_map is not None and report.abstained is None:
            scratch.seek(0)
            if _map_format(defect_map) == "tiff":
                rows = _grey_bands(lambda count: scratch.read(count * width), width, height)
                write_strips(defect_map, Image(np.zeros((1, width), np.uint8), "tiff"), height, rows)
            else:
                whole = np.frombuffer(scratch.read(), np.uint8).reshape(height, width)
                write_atomically(defect_map, imaging.encode(Image(whole)))
    return report


def _grey_bands(read: Callable[[int], bytes], width: int, height: int) -> Iterator[Image]:
    for top in range(0, height, 512):
        rows = min(512, height - top)
        yield Image(np.frombuffer(read(rows), np.uint8).reshape(rows, width), "tiff")


def _as_grey(chance: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.rint(chance * 255).astype(np.uint8)


def _check_map(restorer: Restorer, path: Path) -> None:
    _map_format(path)
    if restorer.model.config.mask != "predicted":
        raise ConfigError(
            "this model predicts no defect map: take one that was trained with model.mask=predicted, or ask for none"
        )


def _map_format(path: Path) -> imaging.Format:
    suffix = path.suffix.lower()
    if suffix not in (".png", ".tif", ".tiff"):
        raise ConfigError(f"{path}: a defect map is a PNG or a TIFF: name it with .png or .tiff")
    return "png" if suffix == ".png" else "tiff"


@contextlib.contextmanager
def _named(source: Path, target: Path) -> Generator[None]:
    """A failed write as one sentence that names both files."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{target} cannot be written from {source} ({error.strerror}): check the folder and its free space"
        ) from error
