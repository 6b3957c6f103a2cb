"""Which images ended a decoder: files in a folder, for all decoders of a machine."""

import contextlib
import logging
import re
import time
from pathlib import Path

logger = logging.getLogger(__name__)

STRIKES = 2
"""An image that ended so many decoders is not tried again."""
_ENTRY = re.compile(r"[0-9a-f]{64}\.\d")


class Ledger:
    """A folder that remembers the images that ended a decoder: a file for each time, named by SHA-256, with the cause.

    Decoders of several processes may share it. It keeps the latest `limit` entries, and each for `keep_s` seconds,
    as a machine that was only slow must not shut an image out for ever. A folder that cannot be read or written is
    a line in the log, and remembers nothing.
    """

    def __init__(self, folder: Path, *, limit: int = 1000, keep_s: float = 24 * 3600) -> None:
        self._folder = folder
        self._limit = limit
        self._keep_s = keep_s

    def empty(self) -> bool:
        """Whether it remembers no image, as is usual: then nobody needs to hash one."""
        try:
            return not any(_ENTRY.fullmatch(path.name) for path in self._folder.iterdir())
        except OSError:
            return True

    def refuses(self, sha256: str) -> bool:
        """Whether the image ended `STRIKES` decoders."""
        try:
            return all(self._counts(path.stat().st_mtime) for path in self._paths(sha256))
        except OSError:
            return False

    def record(self, sha256: str, cause: str) -> None:
        """Note that the image ended a decoder."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._forget()
            for path in self._paths(sha256):
                with contextlib.suppress(FileExistsError), path.open("x") as file:
                    file.write(cause + "\n")
                    return
        except OSError as error:
            logger.warning("the ledger of images that ended a decoder cannot be written (%s)", error)

    def _forget(self) -> None:
        """Remove what is too old, and the oldest of what is too many once there is one more."""
        for place, (written, path) in enumerate(sorted(self._entries(), reverse=True), 1):
            if place >= self._limit or not self._counts(written):
                path.unlink(missing_ok=True)

    def _counts(self, written: float) -> bool:
        return time.time() - written < self._keep_s

    def _entries(self) -> list[tuple[float, Path]]:
        """When each was written, in seconds since the epoch. Other files in the folder are none of its business."""
        found: list[tuple[float, Path]] = []
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if _ENTRY.fullmatch(path.name):
                    with contextlib.suppress(FileNotFoundError):  # another decoder's removal
                        found.append((path.stat().st_mtime, path))
        return found

    def _paths(self, sha256: str) -> list[Path]:
        return [self._folder / f"{sha256}.{strike}" for strike in range(1, STRIKES + 1)]
