"""What a plain S3 address is: one that every reader takes for the same object."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_KEY_BYTES = 1024
"""What S3 takes at most for a key."""
_URI = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.+))?")
_FOUR_NUMBERS = re.compile(r"\d+(\.\d+){3}")
_FORBIDDEN = frozenset('%\\@?#*"<>|')


@dataclass(frozen=True)
class S3Address:
    """An object below one of the allowed roots: the root's URI and the key under it."""

    root: str
    key: str

    @property
    def uri(self) -> str:
        return f"{self.root}/{self.key}"


def is_plain(uri: str) -> bool:
    """Whether `uri` is `s3://bucket` or `s3://bucket/key` in a form that leaves no room for another reading.

    Nothing is decoded and then believed, since what one reader takes for `..` another takes for a name: an address
    that means something else when its Unicode is normalised, as some file systems do, is not plain either.
    """
    return _reads_plainly(uri) and _reads_plainly(_normal(uri)) and _normal(uri).count("/") == uri.count("/")


def is_root(uri: str) -> bool:
    """Whether `uri` can be a place to work in: a plain address, with or without a slash at its end."""
    return is_plain(uri.removesuffix("/"))


def is_below(uri: str, root: str) -> bool:
    """Whether the plain `uri` names an object in `root`; `s3://plant/line-33/x` is not below `s3://plant/line-3`."""
    return uri.startswith(root.rstrip("/") + "/")


def area_of(uri: str, root: str, names: Iterable[str]) -> str | None:
    """The one of `names` right below `root` that holds or is the plain `uri`, also for one who tells no case apart."""
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    place = "/".join(("s3:/", bucket, *filter(None, prefix.split("/"))))
    for name in names:
        taken = _folded(f"{place}/{name}")
        if _folded(uri) == taken or _folded(uri).startswith(taken + "/"):
            return name
    return None


def _reads_plainly(uri: str) -> bool:
    match = _URI.fullmatch(uri)
    if not match or _FOUR_NUMBERS.fullmatch(match[1]) or not {"..", ".-", "-."}.isdisjoint(_pairs(match[1])):
        return False
    return match[2] is None or _is_plain_key(match[2])


def _is_plain_key(key: str) -> bool:
    return (
        key.isprintable()
        and len(key.encode()) <= MAX_KEY_BYTES
        and all(part.strip(" .") for part in key.split("/"))
        and _FORBIDDEN.isdisjoint(key)
    )


def _pairs(text: str) -> Iterator[str]:
    return (text[start : start + 2] for start in range(len(text) - 1))


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _folded(text: str) -> str:
    parts = _normal(_normal(text).casefold()).split("/")
    return "/".join(part.rstrip(" .") for part in parts)
