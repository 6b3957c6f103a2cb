"""The key file: whose key is which, and what it opens. It holds hashes only, and a key is shown once, when made."""

import datetime
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from kintsugi.errors import ConfigError
from kintsugi_serve.access.addresses import is_root

TENANT = r"[a-z0-9][a-z0-9-]{0,62}"
Tenant = Annotated[str, StringConstraints(pattern=f"^{TENANT}$")]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]

_OF_NOTHING = hashlib.sha256().hexdigest()
_REMEDIES = {
    "keys": "list at least one key below 'keys:', or start without a key file",
    "tenant": "give 1 to 63 of a-z, 0-9 and '-', in quotes where it is a number or a word such as 'no'",
    "sha256": "give the 64 hex digits that 'printf %s KEY | sha256sum' prints, in quotes",
    "prefixes": "list them as s3://bucket/prefix/",
    "requests_per_minute": "give a whole number from 1, or leave it out",
    "expires": "give a day such as 2027-01-01, or leave it out",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Key(_Frozen):
    """One entry of the key file. A tenant may have several keys, for example an old and a new one."""

    tenant: Tenant
    sha256: Sha256 = Field(description="of the key itself")
    prefixes: tuple[str, ...] = Field(default=(), description="s3://bucket/prefix/ where it may read and write")
    requests_per_minute: int | None = Field(default=None, ge=1, description="of the tenant; default: no limit")
    expires: datetime.date | None = Field(default=None, description="the first day (UTC) on which it opens nothing")

    @field_validator("sha256")
    @classmethod
    def _is_of_a_key(cls, value: str) -> str:
        if value == _OF_NOTHING:
            raise ValueError("is the hash of an empty text, not of a key")
        return value

    @field_validator("prefixes")
    @classmethod
    def _are_addresses(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in prefixes:
            if not is_root(prefix):
                raise ValueError(f"{prefix!r} is not an address")
        return prefixes


class KeyFile(_Frozen):
    """The whole file."""

    keys: tuple[Key, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        check_keys(self.keys)
        return self


def check_keys(keys: Iterable[Key]) -> None:
    """Raises ValueError where two entries contradict each other."""
    owners: dict[str, int] = {}
    rates: dict[str, tuple[int, int | None]] = {}
    for number, key in enumerate(keys):
        first = owners.setdefault(key.sha256, number)
        if first != number:
            raise ValueError(f"keys[{number}] has the hash of keys[{first}]: take one of the two out")
        first, rate = rates.setdefault(key.tenant, (number, key.requests_per_minute))
        if rate != key.requests_per_minute:
            raise ValueError(
                f"keys[{number}] gives tenant {key.tenant} another requests_per_minute than keys[{first}]: "
                "a tenant has one, give both the same"
            )


def read_keys(path: Path | str) -> tuple[Key, ...]:
    """The keys of a YAML file.

    Raises:
        ConfigError: the file cannot be read, others than its owner may change it, or an entry is wrong. A hash is
            never told, since a key itself may have been written in its place.
    """
    try:
        with Path(path).open(encoding="utf-8") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): give the path of a YAML file with keys") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{path}: others than its owner may change who is let in: run chmod go-w {path}")
    return parse_keys(text, str(path))


def parse_keys(text: str, source: str = "keys") -> tuple[Key, ...]:
    """As `read_keys`, of the file's text."""
    try:
        tree = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}: is not valid YAML{line}: correct it there, or indent it as the example") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a day that the calendar does not have
        raise ConfigError(f"{source}: is not valid YAML: write plain text, and days as 2027-01-01") from None
    try:
        return KeyFile.model_validate(tree).keys
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(dict.fromkeys(_explain(e) for e in error.errors()))}") from None


def new_key() -> tuple[str, str]:
    """A key of 256 random bits, and its SHA-256 for the key file."""
    key = f"kg_{secrets.token_urlsafe(32)}"
    return key, sha256_of(key)


def sha256_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _explain(error: Any) -> str:
    message, location = str(error["msg"]).removeprefix("Value error, "), error["loc"]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    place = place if place.isprintable() else repr(place)
    field = next((part for part in reversed(location) if isinstance(part, str)), "")
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return f"{place}: no such setting, take it out or correct its name"
    if not place:
        return message if error["type"] == "value_error" else f"must hold a mapping: {_REMEDIES['keys']}"
    if error["type"] == "missing":
        return f"{place} is missing: {_REMEDIES[field]}"
    if error["type"] == "model_type":
        return f"{place}: must be a mapping with tenant and sha256"
    shown = f" (got {error['input']!r})" if field not in ("sha256", "keys") else ""
    return f"{place}: {message[0].lower()}{message[1:]}{shown}: {_REMEDIES[field]}"
