"""Room on the disk for one large image at a time, given back in every case."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from kintsugi_serve.schemas import Refusal

SPARE_BYTES = 2**28
"""That a large image leaves free on the disk, for others."""


@contextmanager
def scratch_folder(root: Path) -> Generator[Path]:
    """A folder below `root` that is gone afterwards, and so are those of processes that were killed before.

    A folder's owner holds a lock on it, which ends with its process.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / uuid.uuid4().hex
    with _locked(root):
        for left in root.iterdir():
            _remove_unless_held(left)
        folder.mkdir()
        held = os.open(folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def check_space(folder: Path, size: int) -> None:
    """Raise Refusal unless `size` bytes can be written in `folder`, and some are left then."""
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise disk_full(f"it needs {size + SPARE_BYTES} bytes, {free} are free")


def disk_full(told: str) -> Refusal:
    return Refusal(
        "unavailable",
        f"there is no room for this large image on a machine's disk ({told}): make some where KINTSUGI_CACHE lies",
    )


def reserve(file: Path, descriptor: int, size: int) -> None:
    """Take `size` bytes of the disk for the open `file`, as `check_space`."""
    check_space(file.parent, size)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise disk_full(str(error.strerror)) from error


@contextmanager
def _locked(root: Path) -> Generator[None]:
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_unless_held(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # its owner has removed it
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
