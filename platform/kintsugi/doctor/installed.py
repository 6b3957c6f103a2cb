"""What is installed: Python, packages, programs, weights."""

import importlib.metadata as metadata
import importlib.util
import re
import shutil
import sys
from pathlib import Path

from packaging.requirements import Requirement

import kintsugi
from kintsugi.doctor.finding import Finding, note, ok, problem, warning

AGAIN = "install kintsugi again with its dependencies ('make install' in a checkout)"
SHOWN = 4


def python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = metadata.metadata("kintsugi")["Requires-Python"] or ""
    if wanted and not Requirement(f"python{wanted}").specifier.contains(found):
        return problem("Python", f"{found}, and kintsugi needs {wanted}", "make .venv anew with a Python of that range")
    return ok("Python", found)


def packages() -> Finding:
    """Each dependency against the bounds in pyproject.toml."""
    wrong = unfit(metadata.requires("kintsugi") or [])
    if wrong:
        return problem("packages", _some(wrong), AGAIN)
    return ok("packages", f"kintsugi {kintsugi.__version__}, Ray {version('ray')}, torch {version('torch')}")


def unfit(requirements: list[str]) -> list[str]:
    """What is missing or outside its bounds, a phrase for each."""
    wanted = [Requirement(text) for text in requirements]
    found = [
        (want, version(want.name)) for want in wanted if want.marker is None or want.marker.evaluate({"extra": ""})
    ]
    return [
        f"{want.name} is missing" if has is None else f"{want.name} is {has}, needed {want.specifier}"
        for want, has in found
        if has is None or not want.specifier.contains(has, prereleases=True)
    ]


def lock() -> Finding | None:
    """The installed versions against requirements.lock; only in a checkout."""
    path = Path(kintsugi.__file__).parents[2] / "requirements.lock"
    if not path.is_file():
        return None
    wrong = unlocked(path.read_text())
    if wrong:
        return warning("lock", f"not as requirements.lock has them: {_some(wrong)}", "run 'make install'")
    return ok("lock", "what is installed is what requirements.lock names")


def unlocked(text: str) -> list[str]:
    """The pins of a lock that are not what is installed."""
    pins = re.findall(r"^([A-Za-z0-9._-]+==[^\s\\]+(?: *; *[^\\\n]+)?)", text, re.MULTILINE)
    return unfit([pin.strip() for pin in pins])


def programs() -> Finding:
    """What 'kintsugi up' starts comes with our packages."""
    beside = Path(sys.executable).parent
    missing = [name for name in ("ray", "weed", "tensorboard") if not (beside / name).exists()]
    if missing:
        return problem("programs", f"not beside {sys.executable}: {', '.join(missing)}", AGAIN)
    return ok("programs", "ray, weed (SeaweedFS) and tensorboard are there")


def optional_programs() -> Finding:
    unpacked = Path(kintsugi.__file__).parents[2] / ".kintsugi/debian/usr/sbin/nginx"
    nginx = shutil.which("nginx") or (str(unpacked) if unpacked.exists() else None)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    gateway = "nginx for the gateway" if nginx else "no nginx (the gateway needs it: 'make nginx')"
    return note("optional", f"{gateway}; {'chromium' if browser else 'no chromium'}, with which the page is tested")


def weights() -> Finding:
    folder = Path(kintsugi.__file__).parent / "weights" / "light"
    if not list(folder.glob("*.safetensors")):
        return problem("weights", f"the shipped model is not in {folder}", AGAIN)
    return ok("weights", "the shipped model is there")


def cuda_of_torch() -> str | None:
    """The CUDA version that the installed torch is built for, without importing it; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    told = re.search(r"^cuda\b.*= '([\d.]+)'", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    return told[1] if told else None


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _some(phrases: list[str]) -> str:
    more = f", and {len(phrases) - SHOWN} more" if len(phrases) > SHOWN else ""
    return ", ".join(phrases[:SHOWN]) + more
