"""Doors that must be closed before work starts: who may run code on the cluster, and who may read or spoil the store.

A check raises one sentence that says how to close the door. Two settings leave one open on purpose, for a network that
is closed by other means: `KINTSUGI_ALLOW_OPEN_CLUSTER=1` and `KINTSUGI_ALLOW_PLAIN_S3=1`.
"""

import ipaddress
import os
import stat
import urllib.error
import urllib.request
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from kintsugi import store_check
from kintsugi.errors import ConfigError, StackError, StoreError, StoreUnavailable
from kintsugi.objects import ObjectStore
from kintsugi.storage import S3Store, open_store

OPEN_CLUSTER = "KINTSUGI_ALLOW_OPEN_CLUSTER"
PLAIN_S3 = "KINTSUGI_ALLOW_PLAIN_S3"
TOKEN_LENGTH = 32
"""128 bits in hexadecimal. Ray's own tokens and ours have 64 characters."""


class Answer(NamedTuple):
    """An HTTP answer; `date` as its header tells it, or empty."""

    status: int
    body: bytes
    date: str


def check_token() -> None:
    """Raises StackError for a token of this environment that is missing, too short, or readable by others."""
    if not asks_for_token():
        return
    where, token = "RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        where = str(token_path())
        check_private(token_path())
        try:
            token = token_path().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise StackError(f"the Ray token in {where} cannot be read ({error}): copy the cluster's there") from error
    if len(token.strip()) < TOKEN_LENGTH:
        raise StackError(
            f"the Ray token in {where} has {len(token.strip())} characters and can be guessed: give the cluster one "
            f"of {TOKEN_LENGTH} or more, for example from 'openssl rand -hex 32'"
        )


def check_private(path: Path) -> None:
    """Raises StackError if others can read a secret file.

    Where another owner grants it by group, as a Kubernetes secret does, only everybody else is kept out.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise StackError(f"{path} cannot be read ({error}): copy the cluster's Ray token there, mode 0600") from error
    if found.st_mode & (0o077 if found.st_uid == os.geteuid() else 0o007):
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        raise StackError(f"{path} can be read by others (mode {mode}): run 'chmod 600 {path}'")


def check_cluster(gcs: str, dashboard: str) -> None:
    """Raises StackError for a cluster (both `host:port`) that others reach and that runs anyone's code."""
    if allowed(OPEN_CLUSTER):
        return
    beyond = [address for address in (gcs, dashboard) if address and not is_loopback(host_of(address))]
    if beyond and (not asks_for_token() or is_open(f"http://{dashboard}")):
        raise StackError(
            f"the Ray cluster at {beyond[0]} runs the code of anyone who reaches it, as it asks for no token: start it "
            f"with RAY_AUTH_MODE=token (docs/security.md), or set {OPEN_CLUSTER}=1 where only you can reach it"
        )


@cache
def check_store(uri: str) -> None:
    """Refuse an S3 store that is spoken to in the clear or breaks its conditions; once a process.

    A folder is not tried: its conditions are kept by a file lock of ours, which fails aloud.

    Raises:
        ConfigError: plain HTTP beyond loopback.
        StoreError: a second writer replaces what the first wrote, or the store does not answer.
    """
    store = open_store(uri)
    if isinstance(store, S3Store):
        check_transport(store)
        check_conditions(store)


def check_transport(store: ObjectStore) -> None:
    """Raises ConfigError for an S3 store reached by plain HTTP beyond loopback."""
    if isinstance(store, S3Store) and is_plain(store.endpoint) and not allowed(PLAIN_S3):
        raise ConfigError(
            f"{store.endpoint} is plain HTTP, so that anyone on the way reads and changes images and models: use "
            f"https:// in AWS_ENDPOINT_URL, or set {PLAIN_S3}=1 in a network of your own"
        )


def check_conditions(store: ObjectStore) -> None:
    """Raises StoreError for a store that ignores conditions, or does not answer; one that takes no writes passes."""
    try:
        found = store_check.fault(store)
    except StoreUnavailable:
        raise
    except StoreError:
        return  # reading alone needs no conditions, and a write that is refused says so itself
    if found:
        raise StoreError(
            f"{store.uri} cannot hold models and datasets, as {found}: use a store with conditional writes, such as "
            "Amazon S3, MinIO, Ceph or SeaweedFS of today"
        )


def asks_for_token() -> bool:
    """Whether Ray in this environment speaks with a token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def token_path() -> Path:
    """Where Ray reads its token if the environment does not hold it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def allowed(setting: str) -> bool:
    return os.environ.get(setting, "") == "1"


def is_plain(url: str) -> bool:
    """Whether a URL is plain HTTP to a host beyond loopback."""
    parts = urlsplit(url)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def host_of(address: str) -> str:
    """The host of `host:port` or of a URL."""
    return urlsplit(address if "//" in address else f"//{address}").hostname or ""


def is_open(dashboard: str) -> bool:
    """Whether a Ray dashboard tells what it should tell only to those with the token; not if nothing answers."""
    answer = ask(f"{dashboard}/api/version")
    return answer is not None and answer.status == 200


def ask(url: str, token: str = "", timeout_s: float = 5.0) -> Answer | None:
    """GET `url`, past any proxy; None if nothing answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
        with opener.open(request, timeout=timeout_s) as answer:
            return Answer(answer.status, answer.read(), answer.headers.get("Date", ""))
    except urllib.error.HTTPError as error:
        return Answer(error.code, b"", error.headers.get("Date", ""))
    except (OSError, ValueError, HTTPException):
        return None
