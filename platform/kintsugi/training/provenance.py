"""Which code a run was trained by."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

SENT_COMMIT = "KINTSUGI_SOURCE_COMMIT"
"""What a job is told of the code that came with it, as it comes without git."""
PACKAGES = (
    *("kintsugi", "torch", "torchvision", "ray", "kornia", "timm"),
    *("numpy", "opencv-python-headless", "pyarrow", "safetensors"),
)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def source_commit(folder: Path | None = None) -> str | None:
    """The commit of the source tree in `folder` (default: where this file lies), with `-dirty` where files differ.

    Else the one that `kintsugi submit` sent along with the code, or that pip noted when it installed from git; None
    where none is known.
    """
    here = folder or Path(__file__).parent
    # Tracked, not just within some repository: a virtual environment may lie in the user's own.
    if _git(here, "ls-files", "."):
        return _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None if folder else os.environ.get(SENT_COMMIT) or _installed_commit()


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _installed_commit() -> str | None:
    """https://packaging.python.org/en/latest/specifications/direct-url/"""
    try:
        noted = distribution("kintsugi").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(noted or "{}").get("vcs_info", {}).get("commit_id")
