"""The local stack: its home, its processes, what it listens on."""

import contextlib
import os
import stat
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from kintsugi import doors, processes
from kintsugi.doctor.finding import Finding, note, ok, problem, warning
from kintsugi.errors import StackError
from kintsugi.stack import Stack, credentials_file, find, home_folder, record_file, token_file

PARTS = ("weed", "gcs_server", "raylet")
USUAL_DASHBOARD = "http://127.0.0.1:8265"


def home() -> Finding:
    """Writable by us, closed to others."""
    folder = home_folder().expanduser().resolve()
    if not folder.exists():
        return note("home", f"{folder} is not there yet: 'kintsugi up' makes it")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return problem("home", f"{folder} cannot be written to", "set KINTSUGI_HOME to a folder of yours")
    secrets = (credentials_file(folder), token_file(folder), record_file(folder))
    loose = [path for path in secrets if path.exists() and path.stat().st_mode & 0o077]
    if loose:
        names = " ".join(map(str, loose))
        return problem("home", f"others can read {', '.join(path.name for path in loose)}", f"run 'chmod 600 {names}'")
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        return warning("home", f"others may look into {folder} (mode {mode:04o})", f"run 'chmod 700 {folder}'")
    return ok("home", f"{folder}, closed to others")


def stack() -> Finding:
    """Whether what is recorded runs, and nothing that is not recorded."""
    folder = home_folder().expanduser().resolve()
    recorded = find(folder)
    left = leftovers(folder, recorded)
    if left:
        told = ", ".join(f"{process.name()} {process.pid}" for process in left)
        pids = " ".join(str(process.pid) for process in left)
        return problem("stack", f"left over from a stack that is no longer recorded: {told}", f"run 'kill {pids}'")
    if recorded is None:
        return note("stack", "none runs here: 'kintsugi up' starts one")
    dead = [part for part in recorded.parts if recorded.state(part) != "running"]
    if dead:
        return problem("stack", f"recorded, but stopped: {', '.join(dead)}", "run 'kintsugi down', then 'kintsugi up'")
    return ok("stack", f"{', '.join(recorded.parts)} run")


def running() -> Stack | None:
    """The recorded stack, if its Ray head runs; what cannot be read is told by `stack`."""
    with contextlib.suppress(StackError):
        recorded = find(home_folder())
        return recorded if recorded is not None and recorded.state("ray") == "running" else None
    return None


def leftovers(folder: Path, recorded: Stack | None) -> list[psutil.Process]:
    """Parts of a stack that were started in this home and that no record knows."""
    known = {process.pid for process in family(recorded)} if recorded else set[int]()
    found: list[psutil.Process] = []
    for process in psutil.process_iter(["name"]):
        if process.info["name"] in PARTS and process.pid not in known:
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(folder):
                    found.append(process)
    return found


def family(recorded: Stack) -> list[psutil.Process]:
    return [process for record in recorded.processes.values() for process in processes.family(record)]


def listening() -> Finding | None:
    """Every port of the stack's processes, but the endpoint's, is on loopback."""
    recorded = running()
    if recorded is None:
        return None
    found = listens(family(recorded))
    endpoint = urlsplit(recorded.endpoint).port
    beyond = sorted(f"{host}:{port}" for host, port in found if not doors.is_loopback(host) and port != endpoint)
    if beyond:
        return problem(
            "listening", f"beyond this machine: {', '.join(beyond)}", "run 'kintsugi down', then 'kintsugi up'"
        )
    return ok("listening", f"{len(found)} ports, all on 127.0.0.1")


def listens(members: list[psutil.Process]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which these processes listen."""
    found: set[tuple[str, int]] = set()
    for process in members:
        with contextlib.suppress(psutil.Error):
            connections = process.net_connections(kind="tcp")
            found |= {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def endpoint() -> Finding | None:
    """A service that others reach asks for keys."""
    recorded = running()
    if recorded is None:
        return None
    port = urlsplit(recorded.endpoint).port
    hosts = {host for host, at in listens(family(recorded)) if at == port}
    if not hosts:
        return None
    if all(map(doors.is_loopback, hosts)):
        return ok("endpoint", f"{recorded.endpoint}, on 127.0.0.1 only")
    answer = doors.ask(f"{recorded.endpoint}/v1/models")
    if answer is not None and answer.status == 200:
        return problem(
            "endpoint",
            f"anyone who reaches port {port} of this machine is served",
            "serve with --keys (docs/endpoint.md)",
        )
    return ok(
        "endpoint", f"port {port} is open to others and asks for keys: keep a gateway before it (docs/gateway.md)"
    )


def dashboard() -> Finding | None:
    """The stack's dashboard asks for its token; no other on the usual port runs anyone's code."""
    recorded = running()
    if recorded is not None:
        return dashboard_at(recorded.dashboard)
    return dashboard_at(USUAL_DASHBOARD) if doors.is_open(USUAL_DASHBOARD) else None


def dashboard_at(url: str) -> Finding:
    answer = doors.ask(f"{url}/api/version")
    if answer is None:
        return problem("dashboard", f"{url} does not answer", "run 'kintsugi status'")
    if answer.status == 200:
        return problem(
            "dashboard",
            f"{url} runs code for any program and any user of this machine, as it asks for no token",
            "stop that Ray, and start it with RAY_AUTH_MODE=token, or by 'kintsugi up'",
        )
    return ok("dashboard", f"{url} refuses who has no token ({answer.status})")
