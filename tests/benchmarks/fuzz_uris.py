"""Hostile S3 addresses against the check that keeps a tenant to its own prefixes.

`--count` addresses are made from a seed: valid and hostile parts, put together and then damaged. The check may refuse
what it likes; what it accepts is judged by an oracle that shares nothing with it. The oracle reads an address in every
way that it knows some program to read one (decoded, normalised, folded, cut, cleaned, with dots resolved), again and
again until nothing new comes out, and each of these readings must lie where the tenant may be. Weaker checks, which
must let some through, show that the addresses are hostile enough and that the oracle sees it.
"""

import argparse
import posixpath
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_plus, urlsplit

from rows import Row, measured, output_of, print_table, write_rows

from kintsugi_serve.objects.places import allowed_address, writable_address
from kintsugi_serve.schemas import Refusal

STORE = "s3://plant/kintsugi"
CLOSED = ("models", "datasets", "runs", "results")
MOST_READINGS = 400


@dataclass(frozen=True)
class Tenant:
    """Where one may work."""

    name: str
    prefixes: tuple[str, ...]


TENANTS = (
    Tenant("line-3", ("s3://plant/line-3", "s3://cold/archive/line-3/")),
    Tenant("line-33", ("s3://plant/line-33/",)),
    Tenant("store", (STORE,)),
    Tenant("bucket", ("s3://plant/",)),
)
Check = Callable[[str, Tenant], bool]
"""Whether an address is accepted."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz-uris", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="hostile addresses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=output_of("fuzz-uris"))
    options = parser.parse_args(arguments)
    rows = [*hostile_rows(options.count, options.seed), *valid_rows(max(1, options.count // 10), options.seed)]
    print_table(rows)
    write_rows(rows, options.output)
    return int(any(row.holds is False for row in rows))


def hostile_rows(count: int, seed: int) -> Iterator[Row]:
    """Escapes of every check over the same addresses, each tried by every tenant."""
    dice = random.Random(seed)
    accepted, escaped, examples = Counter[str](), Counter[str](), dict[str, str]()
    moved = unread = 0
    for _ in range(count):
        uri = hostile(dice)
        where = readings(uri)
        unread += where is None
        for tenant in TENANTS:
            moved += leads_elsewhere(uri, tenant)
            for name, (check, to_write) in CHECKS.items():
                if check(uri, tenant):
                    accepted[name] += 1
                    if name in OURS if where is None else not all(may_be(at, tenant, to_write) for at in where):
                        escaped[name] += 1
                        examples.setdefault(name, uri)
    yield measured("accepted addresses that lead elsewhere than written", moved, "== 0", n=count * len(TENANTS))
    yield Row(
        "addresses with more readings than are followed", unread, n=count, note="escapes of ours, not of the weaker"
    )
    for name in CHECKS:
        goal = "== 0" if name in OURS else ">= 1"
        example = f"; {examples[name]!a:.60}" if name in examples else ""
        note = f"of {accepted[name]} accepted{example}"
        yield measured(f"escapes: {name}", escaped[name], goal, n=count * len(TENANTS), note=note)


def valid_rows(count: int, seed: int) -> Iterator[Row]:
    """Shares of plain addresses that are accepted: those of the tenant itself, and those of others."""
    dice = random.Random(seed + 1)
    own = other = 0
    for _ in range(count):
        tenant = dice.choice(TENANTS)
        uri = valid(dice, dice.choice(tenant.prefixes))
        own += reads(uri, tenant) and writes(uri, tenant)
        other += reads(valid(dice, "s3://other/line-3"), tenant) or reads(valid(dice, "s3://plan/line-3"), tenant)
    yield measured("plain addresses of the tenant that are accepted", own / count, "== 1", n=count)
    yield measured("plain addresses elsewhere that are accepted", other / count, "== 0", n=count)


# ---------------------------------------------------------------------------- checks


def _is_accepted(address: Callable[[], object]) -> bool:
    try:
        address()
    except Refusal:
        return False
    return True


def reads(uri: str, tenant: Tenant) -> bool:
    return _is_accepted(lambda: allowed_address(uri, tenant.prefixes))


def writes(uri: str, tenant: Tenant) -> bool:
    return _is_accepted(lambda: writable_address(uri, tenant.prefixes, STORE))


def leads_elsewhere(uri: str, tenant: Tenant) -> bool:
    """Whether the address is accepted, and the prefix and the key that it is split into are not what it says."""
    try:
        address = allowed_address(uri, tenant.prefixes)
    except Refusal:
        return False
    known = address.root in {prefix.rstrip("/") for prefix in tenant.prefixes}
    return not known or f"{address.root}/{address.key}" != uri


def _starts_with_prefix(uri: str, tenant: Tenant) -> bool:
    return uri.startswith(tenant.prefixes)


def _starts_with_folder(uri: str, tenant: Tenant) -> bool:
    return any(uri.startswith(prefix.rstrip("/") + "/") for prefix in tenant.prefixes)


def _has_no_dots(uri: str, tenant: Tenant) -> bool:
    return ".." not in uri and _starts_with_folder(uri, tenant)


def _is_decoded_and_resolved(uri: str, tenant: Tenant) -> bool:
    scheme, _, path = unquote(uri).partition("://")
    return _starts_with_folder(uri, tenant) and _starts_with_folder(f"{scheme}://{posixpath.normpath(path)}", tenant)


def _is_plain_ascii_wise(uri: str, tenant: Tenant) -> bool:
    """All that can be asked without a thought of Unicode."""
    parts = uri.removeprefix("s3://").split("/")
    plain = uri.isprintable() and all(part.strip(" .") for part in parts) and not set('%\\@?#:*"<>|') & set(uri[5:])
    return plain and _starts_with_folder(uri, tenant)


def _writes_unless_named_so(uri: str, tenant: Tenant) -> bool:
    return reads(uri, tenant) and not uri.startswith(tuple(f"{STORE}/{name}/" for name in CLOSED))


OURS: dict[str, tuple[Check, bool]] = {"read": (reads, False), "write": (writes, True)}
CHECKS: dict[str, tuple[Check, bool]] = OURS | {
    "starts with the prefix": (_starts_with_prefix, False),
    "starts with the prefix and a slash": (_starts_with_folder, False),
    "and holds no '..'": (_has_no_dots, False),
    "decoded once, with dots resolved": (_is_decoded_and_resolved, False),
    "plain in all but Unicode": (_is_plain_ascii_wise, False),
    "written outside areas spelled as they are": (_writes_unless_named_so, True),
}
"""Each check, and whether what it accepts would be written."""


# ---------------------------------------------------------------------------- the oracle


Location = tuple[str, ...]
"""Scheme, bucket and the parts of the key."""


def readings(uri: str) -> set[Location] | None:
    """Where every reading of the address leads; None where there are too many."""
    seen, waiting = {uri}, [uri]
    while waiting:
        if len(seen) > MOST_READINGS:
            return None
        text = waiting.pop()
        for read in READERS:
            other = read(text)
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return {location for text in seen for location in _locations(text)}


def may_be(at: Location, tenant: Tenant, to_write: bool) -> bool:
    """Whether the location is an object below a prefix, and for a writer not in one of the store's own areas."""
    inside = any(_is_in(at, _parts(prefix)) and len(at) > len(_parts(prefix)) for prefix in tenant.prefixes)
    return inside and not (to_write and any(_is_in(at, _parts(f"{STORE}/{name}")) for name in CLOSED))


def _parts(uri: str) -> Location:
    return tuple(part for part in uri.replace("://", "/").split("/") if part)


def _is_in(at: Location, place: Location) -> bool:
    return at[: len(place)] == place


def _locations(text: str) -> Iterator[Location]:
    """By the letters, and as a library for URLs splits them; each with its dots as they are, and resolved."""
    scheme, mark, rest = text.partition("://")
    if not mark:
        yield ("no address", text)
        return
    bucket, _, path = rest.partition("/")
    splits = {(scheme, bucket, path)}
    try:
        split = urlsplit(text)
        splits.add((split.scheme, split.hostname or "", split.path.removeprefix("/")))
    except ValueError:
        yield ("no address", text)
    for found, host, key in splits:
        yield (found, host, *key.split("/"))
        # A path of file systems may leave the bucket, too.
        yield (found, *posixpath.normpath(f"{host}/{key}").split("/"))


def _without_controls(text: str) -> str:
    return "".join(char for char in text if unicodedata.category(char)[0] != "C")


def _without_marks(text: str) -> str:
    """As a database that tells no accents apart."""
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def _stripped_parts(text: str) -> str:
    """As Windows names files."""
    return "/".join(part if set(part) <= {"."} else part.rstrip(" .") for part in text.split("/"))


READERS: tuple[Callable[[str], str], ...] = (
    lambda text: unquote(text, errors="surrogateescape"),
    lambda text: unquote(text, encoding="latin-1"),
    unquote_plus,
    lambda text: unicodedata.normalize("NFKC", text),
    lambda text: unicodedata.normalize("NFKD", text),
    str.casefold,
    str.strip,
    _stripped_parts,
    _without_controls,
    lambda text: text.replace("\\", "/"),
    lambda text: text.partition("\0")[0],
    lambda text: text.partition("\n")[0],
    lambda text: text.partition("?")[0],
    lambda text: text.partition("#")[0],
)


# ---------------------------------------------------------------------------- addresses

SCHEMES = ("s3://", "S3://", "s3:/", "s3:", "s3a://", "http://", "https://", "file://", "//", "arn:aws:s3:::", "")
HOSTS = (
    "plant", "plant.", "plants", "PLANT", "other", "cold", "pl\uff41nt", "plant\u0301", "plant\uff0fline-3", "",
    "plant\u2044line-3", "plant:9000", "plant@other", "user:pw@plant", "plant%2fline-3", "plant--x-s3", "..",
    "169.254.169.254", "[fd00:ec2::254]", "2852039166", "0xa9fea9fe", "metadata.google.internal", "localhost",
    "arn:aws:s3:eu-central-1:1:accesspoint",
)  # fmt: skip
PARTS = (
    "line-3", "line-33", "line-3-evil", "LINE-3", "line-\uff13", "line", "archive", "kintsugi", "a.png",
    "models", "Models", "\uff4dodels", "model\u017f", "runs", "runs.", "runs ", "datasets", "results", "result\u24e2",
    "..", ".", "...", ". .", ".. ", "..;", "..%00", "", " ", "~", "%2e%2e", "%252e%252e", "%c0%ae%c0%ae", "%u002e",
    "\uff0e\uff0e", "\u2025", "\u2024\u2024", "\uff05" + "2e.", "a\uff0fb", "\u2100", "\uff3c..", "a\\..\\b",
    "Teil 7 (öben).tiff", "検査.png", "a" * 300, "\u202e", "\u200b", "\ufdfa",
)  # fmt: skip
TAILS = (
    *("",) * 6, "?versionId=3", "?x-amz-acl=public", "#part", "%00", "\0.png", "\n", "\r\nHost: other", "/", "//",
    "/..", " ", ";v=1",
)  # fmt: skip
CHARACTERS = (
    "/", "\\", ".", "..", "%", "%2f", "%2e", "%25", "@", ":", "?", "#", "*", "'", "\0", "\t", "\n", " ", "ß", "\u00a0",
    "\u3000", "\u200d", "\u00ad", "\ufeff", "\ud800", "\uff0f", "\uff0e", "\uff05", "\u2044", "\u2215", "\u0338",
    "\u0301", "\u0130",
)  # fmt: skip
LETTERS = "abcxyzABCXYZ0123456789-_=+,()!~&$ äöüßéŁ検査部品одна"


def hostile(dice: random.Random) -> str:
    """An address that may be a trap."""
    if dice.random() < 0.6:
        tenant = dice.choice(TENANTS)
        parts = [dice.choice(tenant.prefixes).rstrip("/")]
        parts += [dice.choice(PARTS) if dice.random() < 0.3 else _name(dice) for _ in range(dice.randrange(5))]
        uri = "/".join(parts)
    else:
        host = dice.choice(HOSTS)
        uri = dice.choice(SCHEMES) + "/".join([host, *(dice.choice(PARTS) for _ in range(dice.randrange(1, 5)))])
    uri += dice.choice(TAILS)
    for _ in range(dice.choice((0, 0, 0, 1, 1, 2, 3))):
        uri = dice.choice(DAMAGES)(uri, dice)
    return uri


def valid(dice: random.Random, prefix: str) -> str:
    return "/".join([prefix.rstrip("/"), *(_name(dice) for _ in range(dice.randrange(1, 5)))])


def _name(dice: random.Random) -> str:
    """Some letters, never only spaces, and no name of one of the store's own areas."""
    return "n" + "".join(dice.choice(LETTERS) for _ in range(dice.randrange(8))) + dice.choice((".png", ".tiff", "x"))


def _cut(uri: str, dice: random.Random) -> tuple[str, str, str]:
    start = dice.randrange(len(uri) + 1)
    end = min(len(uri), start + dice.choice((0, 1, 1, 2, 5)))
    return uri[:start], uri[start:end], uri[end:]


def _insert(uri: str, dice: random.Random) -> str:
    before, middle, after = _cut(uri, dice)
    return before + middle + dice.choice(CHARACTERS) + after


def _remove(uri: str, dice: random.Random) -> str:
    before, _, after = _cut(uri, dice)
    return before + after


def _encode(uri: str, dice: random.Random) -> str:
    before, middle, after = _cut(uri, dice)
    encoded = "".join(f"%{byte:02x}" for byte in middle.encode("utf-8", "surrogatepass"))
    return before + (encoded.replace("%", "%25") if dice.random() < 0.3 else encoded) + after


def _widen(uri: str, dice: random.Random) -> str:
    """Into the forms of full width, which compatibility makes ASCII of again."""
    before, middle, after = _cut(uri, dice)
    return before + "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in middle) + after


def _swap_case(uri: str, dice: random.Random) -> str:
    before, middle, after = _cut(uri, dice)
    return before + middle.swapcase() + after


def _backslash(uri: str, dice: random.Random) -> str:
    before, middle, after = _cut(uri, dice)
    return before + middle + after.replace("/", "\\", 1)


def _repeat(uri: str, dice: random.Random) -> str:
    before, middle, after = _cut(uri, dice)
    return before + middle * dice.choice((2, 2, 2, 500)) + after


DAMAGES = (_insert, _insert, _insert, _remove, _encode, _widen, _swap_case, _backslash, _repeat)


if __name__ == "__main__":
    raise SystemExit(main())
