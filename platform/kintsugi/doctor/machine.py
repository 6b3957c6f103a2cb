"""What the machine offers: GPU, disk, shared memory, open files."""

import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil

from kintsugi.doctor import installed
from kintsugi.doctor.finding import Finding, note, ok, problem, warning
from kintsugi.stack import home_folder
from kintsugi.storage import cache_folder

GIB = 1024**3
DISK_PROBLEM = 1 * GIB
DISK_WARNING = 10 * GIB
RAY_FULL = 0.95
"""Of a disk: beyond it Ray puts no more objects there (`local_fs_capacity_threshold`)."""
SHARED_PART = 0.3
"""Of the memory: what Ray takes for its object store; with less in /dev/shm it goes to the disk, slowly."""
OPEN_FILES = 4096
ENOUGH_FILES = 65536
ASK_S = 5.0


def gpu() -> Finding:
    """What nvidia-smi sees, and whether the installed torch can use it."""
    names = gpus()
    if names is None:
        if Path("/dev/nvidia0").exists():
            return warning(
                "GPU", "there is /dev/nvidia0, and nvidia-smi does not answer", "install NVIDIA's driver anew"
            )
        return note("GPU", "no NVIDIA GPU is seen: work runs on the CPU")
    cuda = installed.cuda_of_torch()
    if cuda is None:
        return problem(
            "GPU", f"{', '.join(names)}, but the installed torch is for CPUs", "install a CUDA build of torch"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return warning("GPU", f"{', '.join(names)}, hidden by CUDA_VISIBLE_DEVICES=", "unset CUDA_VISIBLE_DEVICES")
    return ok("GPU", f"{', '.join(names)}; torch is built for CUDA {cuda}")


def gpus() -> list[str] | None:
    """The names of the GPUs that nvidia-smi lists; None if there is none or it does not answer."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=ASK_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip().splitlines() or None if told.returncode == 0 else None


def disk() -> Finding:
    """The fullest of the places that work writes to."""
    places = {_existing(place) for place in (home_folder(), cache_folder(), Path(tempfile.gettempdir()))}
    return disk_of({str(place): _space(place) for place in places})


def disk_of(places: dict[str, tuple[int, int]]) -> Finding:
    """Of places with (free, total) bytes."""
    place, (free, total) = min(places.items(), key=lambda item: item[1][0])
    tells = f"{free / GIB:.1f} GiB free of {total / GIB:.0f} at {place}"
    make_room = "make room, or set KINTSUGI_HOME, KINTSUGI_CACHE and TMPDIR to another disk"
    if free < DISK_PROBLEM:
        return problem("disk", tells, make_room)
    if free < DISK_WARNING or free < (1 - RAY_FULL) * total:
        return warning("disk", tells, make_room)
    return ok("disk", tells)


def shared_memory() -> Finding | None:
    place = Path("/dev/shm")
    if not place.is_dir():
        return None
    return shared_memory_of(shutil.disk_usage(place).total, psutil.virtual_memory().total)


def shared_memory_of(size: int, memory: int) -> Finding:
    """Sizes in bytes."""
    tells = f"/dev/shm has {size / GIB:.1f} GiB; Ray's object store wants {SHARED_PART * memory / GIB:.1f}"
    if size < SHARED_PART * memory:
        wanted = f"--shm-size={SHARED_PART * memory / GIB:.0f}g"
        return warning(
            "shared memory",
            tells,
            f"in a container {wanted}, in Kubernetes an emptyDir with medium: Memory; else remount",
        )
    return ok("shared memory", tells)


def open_files() -> Finding:
    return open_files_of(*resource.getrlimit(resource.RLIMIT_NOFILE))


def open_files_of(soft: int, hard: int) -> Finding:
    """The limits of a process, as `ulimit -n` tells them."""
    endless = resource.RLIM_INFINITY
    if soft == endless or soft >= OPEN_FILES:
        return ok("open files", f"a process may open {'any number' if soft == endless else soft}")
    most = ENOUGH_FILES if hard == endless else min(ENOUGH_FILES, hard)
    if most > soft:
        return warning("open files", f"a process may open {soft}", f"run 'ulimit -n {most}' before 'kintsugi up'")
    raising = f"raise it to {ENOUGH_FILES} in /etc/security/limits.conf, or by LimitNOFILE= of the service"
    return warning("open files", f"a process may open {soft} and not more", raising)


def _existing(place: Path) -> Path:
    """The nearest folder above that is there."""
    resolved = place.expanduser().resolve()
    return next(folder for folder in (resolved, *resolved.parents) if folder.is_dir())


def _space(place: Path) -> tuple[int, int]:
    usage = shutil.disk_usage(place)
    return usage.free, usage.total
