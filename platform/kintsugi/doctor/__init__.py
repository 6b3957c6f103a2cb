"""What is open, missing or old on this machine, on its cluster and in its store, and how to mend it.

A check is a function without arguments that gives a Finding, or None where it does not apply.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from kintsugi.doctor import away, here, installed, machine
from kintsugi.doctor.finding import Finding, from_error, warning
from kintsugi.errors import KintsugiError

__all__ = ["CHECKS", "Check", "Finding", "examine"]

Check = Callable[[], Finding | None]

CHECKS: Mapping[str, Check] = {
    "Python": installed.python,
    "packages": installed.packages,
    "lock": installed.lock,
    "programs": installed.programs,
    "optional": installed.optional_programs,
    "weights": installed.weights,
    "GPU": machine.gpu,
    "disk": machine.disk,
    "shared memory": machine.shared_memory,
    "open files": machine.open_files,
    "home": here.home,
    "stack": here.stack,
    "listening": here.listening,
    "dashboard": here.dashboard,
    "endpoint": here.endpoint,
    "token": away.token,
    "cluster": away.cluster,
    "Ray versions": away.versions,
    "store": away.store,
    "transport": away.transport,
    "clock": away.clock,
}


def examine(checks: Mapping[str, Check] = CHECKS) -> list[Finding]:
    """What every check finds, all begun at once, in the table's order; a check that breaks is a finding too."""
    with ThreadPoolExecutor(len(checks)) as pool:
        begun = {about: pool.submit(check) for about, check in checks.items()}
        found = [_outcome(about, future) for about, future in begun.items()]
    return [finding for finding in found if finding is not None]


def _outcome(about: str, future: "Future[Finding | None]") -> Finding | None:
    error = future.exception()
    if isinstance(error, KintsugiError):
        return from_error(about, error)
    if error is not None:
        told = f"this could not be looked at ({type(error).__name__}: {error})"
        return warning(about, told, "look at it by hand")
    return future.result()
