"""What a job takes along: the code that runs here, and the files that its command names."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from kintsugi.errors import ConfigError

PACKAGES = ("kintsugi", "kintsugi_tune", "kintsugi_serve")
MB = 1_000_000
LARGEST = 5
OUTSIDE = "sent"


@dataclass
class Parcel:
    """A folder in the making. `links` has each file or folder that it holds, under its path there."""

    words: list[str]
    links: dict[str, Path] = field(default_factory=dict[str, Path])


def package_folders() -> list[str]:
    """Where the code lies that is imported here: a checkout's or an installed wheel's."""
    found = [find_spec(name) for name in PACKAGES]
    return [place for spec in found if spec is not None for place in list(spec.submodule_search_locations or ())[:1]]


def pack_named(words: Sequence[str], paths: Iterable[Path], here: Path) -> Parcel:
    """The files and folders that a command names; those that are not below `here` get another path in `words`.

    Raises:
        ConfigError: one of them does not exist.
    """
    parcel = Parcel(list(words))
    for number, path in enumerate(dict.fromkeys(paths)):
        place = here / path
        if not place.exists():
            raise ConfigError(
                f"{path} does not exist: a job takes along the files that its command names, and leaves what it makes "
                f"in the store"
            )
        inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
        name = path.as_posix() if inside else f"{OUTSIDE}/{number}/{place.resolve().name}"
        parcel.links[name] = place.resolve()
        if not inside:
            parcel.words = [_renamed(word, path, name) for word in parcel.words]
    return parcel


def _renamed(word: str, path: Path, name: str) -> str:
    option, equals, value = word.partition("=")
    if word and Path(word) == path:
        return name
    return f"{option}={name}" if option.startswith("--") and equals and Path(value) == path else word


def lay_out(parcel: Parcel, folder: Path) -> None:
    """Links in `folder` to all that the parcel holds; a folder that holds another named path is linked once."""
    for name, target in sorted(parcel.links.items()):
        place = folder / name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(target)


def check_inside(paths: Iterable[Path], folder: Path, sent: Iterable[Path]) -> None:
    """Raises:
    ConfigError: a path that the command names is not among what is sent of the folder.
    """
    there = {path.relative_to(folder.absolute()) for path in sent}
    for path in paths:
        if not any(path == other or path in other.parents for other in there):
            raise ConfigError(
                f"{path} is not among the files that are sent of {folder}: paths in the command are seen from there, "
                f"without what .gitignore and .rayignore name"
            )


def check_size(files: Sequence[tuple[int, Path]], folder: Path, limit_mb: float) -> None:
    """Raises:
    ConfigError: the files are larger than `limit_mb` (10⁶ bytes); it names the largest.
    """
    total = sum(size for size, _ in files)
    if total <= limit_mb * MB:
        return
    largest = sorted(files, key=lambda file: (-file[0], file[1]))[:LARGEST]
    told = ", ".join(f"{path.relative_to(folder.absolute())} ({size / MB:.2f} MB)" for size, path in largest)
    raise ConfigError(
        f"the job would take along {total / MB:.1f} MB in {len(files)} files, more than {limit_mb:g} MB; the largest: "
        f"{told}: name them in a .rayignore, put data into the store ('kintsugi data build'), or raise --max-mb"
    )


def digest(files: Sequence[tuple[int, Path]], folder: Path) -> str:
    """SHA-256 over the paths and the contents of the files; empty for none."""
    if not files:
        return ""
    whole = hashlib.sha256()
    for path in sorted(path for _, path in files):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{content} {path.relative_to(folder.absolute()).as_posix()}\n".encode())
    return whole.hexdigest()
