"""Restore a file to a file: in memory, or as strips where a TIFF is large."""

import contextlib
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from kintsugi import imaging
from kintsugi.errors import ConfigError, ImageError, StoreError
from kintsugi.imaging import Image
from kintsugi.restore.restorer import Band, Map, Restorer
from kintsugi.restore.sources import MaskSource, WholeMask
from kintsugi.restore.strips import TiffStrips, write_strips
from kintsugi.storage import write_atomically
from kintsugi.trust.report import Report

Progress = Callable[[int, int], None]
MapName = Literal["defect_map", "error_bound"]
Maps = Mapping[MapName, Path]
"""Where to write which map: a defect's probability as 8-bit grey, the bound of the absolute error as 16-bit grey."""
_DEPTH: Mapping[MapName, type[np.unsignedinteger]] = {"defect_map": np.uint8, "error_bound": np.uint16}
_TRAINED_WITH: Mapping[MapName, str] = {"defect_map": "model.mask=predicted", "error_bound": "model.error=true"}
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
    maps: Maps | None = None,
    progress: Progress | None = None,
) -> Report:
    """Restore `source` into `target`, which appears when it is whole, in the same format.

    Args:
        mask: an image of known defects: every value but 0.
        maps: files for the model's maps, PNG or TIFF; of full scale. An image that is left alone has none.
        progress: called with the rows done and all rows where the image passes in strips.

    Raises:
        ImageError: the image or the mask is not one that is restored.
        ConfigError: the model predicts no such map, or the map's name says no format.
        StoreError: a file cannot be read or written.
    """
    maps = dict(maps or {})
    _check_maps(restorer, maps)
    with contextlib.ExitStack() as opened, _named(source, target):
        strips = _open_large(source, white_level)
        if isinstance(strips, Image):
            return _restore_whole(restorer, strips, target, mask, maps)
        opened.enter_context(strips)
        shown = _open_mask(mask, opened)
        return _restore_in_strips(restorer, strips, target, shown, maps, progress)


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


def _restore_whole(restorer: Restorer, image: Image, target: Path, mask: Path | None, maps: Maps) -> Report:
    shown = None if mask is None else imaging.decode_mask(read_file(mask))
    answer = restorer.restore(image, shown)
    write_atomically(target, imaging.encode(answer.image))
    for name, path in maps.items():
        values: Map | None = getattr(answer, name)
        if values is not None:
            write_atomically(path, imaging.encode(_grey(_as_grey(name, values), path)))
    return answer.report


def _restore_in_strips(
    restorer: Restorer,
    strips: TiffStrips,
    target: Path,
    mask: MaskSource | None,
    maps: Maps,
    progress: Progress | None,
) -> Report:
    height, width = strips.size
    for path in maps.values():
        if _map_format(path) == "png" and height * width > imaging.MAX_PIXELS:
            raise ConfigError(f"{path}: a map of {width} x {height} px is too large for a PNG: name it with .tiff")
    like = strips.rows(0, 1)
    with contextlib.ExitStack() as opened:
        kept: dict[MapName, IO[bytes]] = {name: opened.enter_context(tempfile.TemporaryFile()) for name in maps}

        def keep(band: Band) -> None:
            for name, scratch in kept.items():
                values: Map | None = getattr(band, name)
                if values is not None:
                    scratch.write(_as_grey(name, values).tobytes())

        report = restorer.restore_strips(
            strips, lambda bands: write_strips(target, like, height, bands), mask, progress=progress, maps=keep
        )
        if report.abstained is None:
            for name, scratch in kept.items():
                scratch.seek(0)
                _write_map(scratch, maps[name], (height, width), _DEPTH[name])
    return report


def _write_map(scratch: IO[bytes], path: Path, size: tuple[int, int], dtype: type[np.unsignedinteger]) -> None:
    height, width = size

    def rows(count: int) -> Image:
        raw = scratch.read(count * width * dtype().itemsize)
        return _grey(np.frombuffer(raw, dtype).reshape(count, width), path)

    if _map_format(path) == "tiff":
        bands = (rows(min(512, height - top)) for top in range(0, height, 512))
        write_strips(path, _grey(np.zeros((1, width), dtype), path), height, bands)
    else:
        write_atomically(path, imaging.encode(rows(height)))


def _grey(pixels: NDArray[np.unsignedinteger], path: Path) -> Image:
    return Image(pixels, _map_format(path), int(np.iinfo(pixels.dtype).max))


def _as_grey(name: MapName, values: Map) -> NDArray[np.unsignedinteger]:
    dtype = _DEPTH[name]
    return np.rint(np.clip(values, 0, 1) * np.iinfo(dtype).max).astype(dtype)


def _check_maps(restorer: Restorer, maps: Maps) -> None:
    config = restorer.model.config
    there: Mapping[MapName, bool] = {"defect_map": config.mask == "predicted", "error_bound": config.error}
    for name, path in maps.items():
        _map_format(path)
        if not there[name]:
            raise ConfigError(
                f"this model predicts no {name.replace('_', ' ')}: take one that was trained with "
                f"{_TRAINED_WITH[name]}, or ask for none"
            )


def _map_format(path: Path) -> imaging.Format:
    suffix = path.suffix.lower()
    if suffix not in (".png", ".tif", ".tiff"):
        raise ConfigError(f"{path}: a map is a PNG or a TIFF: name it with .png or .tiff")
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
