"""The cluster that RAY_ADDRESS names and the store that KINTSUGI_STORE names."""

import contextlib
import json
import os
import socket
import time
from email.utils import parsedate_to_datetime
from importlib import metadata
from urllib.parse import urlsplit

from kintsugi import doors, store_check
from kintsugi.doctor.finding import Finding, from_error, note, ok, problem, warning
from kintsugi.errors import KintsugiError
from kintsugi.storage import LocalStore, Patience, S3Store, open_store

HASTY = Patience(seconds=2.0, requests=1, connect_s=2.0, stall_s=5.0)
SKEW_WARNING_S = 60.0
SKEW_PROBLEM_S = 15 * 60.0
"""S3 refuses requests whose clock is off by more (RequestTimeTooSkewed)."""


def token() -> Finding | None:
    """The file's mode and the token's length; never the token."""
    if not doors.asks_for_token():
        return None
    try:
        doors.check_token()
    except KintsugiError as error:
        return from_error("token", error)
    where = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(doors.token_path())
    return ok("token", f"{where}: long enough, and nobody else's to read")


def cluster() -> Finding:
    """Whether it is there, and whether it lets in who has no token."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        return note("cluster", "RAY_ADDRESS is not set: training and serving need 'kintsugi up', or a cluster")
    parts = urlsplit(address if "//" in address else f"//{address}")
    host, port = parts.hostname or "", _port(address)
    if port is None:
        return note("cluster", f"RAY_ADDRESS is {address}: which cluster that is, only Ray tells")
    if not reaches(host, port):
        mend = "run 'kintsugi up', or correct RAY_ADDRESS and the way there"
        return problem("cluster", f"nothing answers at {address}", mend)
    answer = doors.ask(f"{dashboard_url()}/api/version", timeout_s=2.0)
    refuses = answer is not None and answer.status in (401, 403)
    if refuses and not doors.asks_for_token():
        mend = "set RAY_AUTH_MODE=token, with the cluster's token where Ray reads it"
        return problem("cluster", f"{address} asks for a token, and this environment has none", mend)
    if refuses:
        return ok("cluster", f"{address} answers, and its dashboard refuses who has no token")
    if (answer and answer.status == 200) or not (doors.is_loopback(host) or doors.asks_for_token()):
        return open_cluster(address)
    return note(
        "cluster", f"{address} takes connections; no dashboard at {dashboard_url()} tells if it asks for a token"
    )


def open_cluster(address: str) -> Finding:
    tells = f"{address} runs the code of anyone who reaches it, as it asks for no token"
    mend = "start it with RAY_AUTH_MODE=token (docs/security.md)"
    if doors.allowed(doors.OPEN_CLUSTER):
        return warning("cluster", f"{tells}, and {doors.OPEN_CLUSTER}=1 allows that", mend)
    return problem("cluster", tells, mend)


def versions() -> Finding | None:
    """Ray here and there; a driver of another version is turned away."""
    answer = doors.ask(f"{dashboard_url()}/api/version", _token()) if os.environ.get("RAY_ADDRESS") else None
    if answer is None:
        return None
    if answer.status in (401, 403):
        return problem(
            "Ray versions", "the cluster refuses this token", "copy the cluster's token to where Ray reads it"
        )
    if answer.status != 200:
        return None
    here, there = metadata.version("ray"), str(json.loads(answer.body).get("ray_version", "unknown"))
    if here != there:
        return problem(
            "Ray versions", f"{here} here, {there} on the cluster", f"install ray=={there} here, or {here} there"
        )
    return ok("Ray versions", f"{here} here and on the cluster")


def dashboard_url() -> str:
    """As the environment names it, else on its usual port on the cluster's host."""
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_DASHBOARD_ADDRESS")
    if named:
        return (named if "//" in named else f"http://{named}").rstrip("/")
    host = doors.host_of(os.environ.get("RAY_ADDRESS", ""))
    return f"http://{f'[{host}]' if ':' in host else host}:8265"


def store() -> Finding:
    """Whether it answers, takes our credentials and keeps its conditions."""
    uri = os.environ.get("KINTSUGI_STORE", "")
    if not uri:
        return note("store", "KINTSUGI_STORE is not set: 'kintsugi up' brings a store, or name yours")
    try:
        found = open_store(uri, HASTY)
        if isinstance(found, LocalStore) and not found.root.is_dir():
            return warning(
                "store", f"there is no folder {found.root} yet", "correct KINTSUGI_STORE, or make the folder"
            )
        fault = store_check.fault(found)
    except KintsugiError as error:
        return from_error("store", error)
    if fault:
        return problem("store", f"{found.uri}: {fault}", "use a store with conditional writes (docs/security.md)")
    return ok("store", f"{found.uri} answers, and its conditional writes hold")


def transport() -> Finding | None:
    """HTTPS beyond loopback."""
    uri = os.environ.get("KINTSUGI_STORE", "")
    if not uri.startswith("s3://"):
        return None
    try:
        found = S3Store(uri, HASTY)
        if doors.is_plain(found.endpoint) and doors.allowed(doors.PLAIN_S3):
            return warning(
                "transport", f"{found.endpoint} is plain HTTP, and {doors.PLAIN_S3}=1 allows that", "use https://"
            )
        doors.check_transport(found)
    except KintsugiError as error:
        return from_error("transport", error)
    return ok("transport", f"{found.endpoint}{', on loopback' if found.endpoint.startswith('http://') else ''}")


def clock() -> Finding | None:
    """This machine's clock against the store's; None if the store does not tell."""
    uri = os.environ.get("KINTSUGI_STORE", "")
    answer = doors.ask(S3Store(uri, HASTY).endpoint, timeout_s=2.0) if uri.startswith("s3://") else None
    if answer is None or not answer.date:
        return None
    return clock_off(time.time() - parsedate_to_datetime(answer.date).timestamp())


def clock_off(seconds: float) -> Finding:
    """By how much this clock is ahead of the store's."""
    tells = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the store's"
    mend = "set the clock by NTP ('timedatectl set-ntp true')"
    if abs(seconds) > SKEW_PROBLEM_S:
        return problem("clock", f"{tells}: S3 refuses more than 15 minutes", mend)
    if abs(seconds) > SKEW_WARNING_S:
        return warning("clock", tells, mend)
    return ok("clock", "agrees with the store's")


def reaches(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


def _port(address: str) -> int | None:
    with contextlib.suppress(ValueError):
        return urlsplit(address if "//" in address else f"//{address}").port
    return None


def _token() -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if doors.asks_for_token():
            return os.environ.get("RAY_AUTH_TOKEN") or doors.token_path().read_text().strip()
    return ""
