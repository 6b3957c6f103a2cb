"""Hosts on one machine: network, process and mount namespaces, joined by a switch; needs root.

    with network(["head", "one", "two"]) as hosts:
        hosts["one"].run(["ip", "address"])
        with hosts["two"].unplugged():
            ...

A host has an address of its own in 10.77.0.0/24 and nothing beyond it, its own processes, /tmp/ray and /dev/shm; all
else of the file system is the machine's. Everything ends with the context, whatever was started in it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from kintsugi.processes import wait_until

SUBNET = "10.77.0"
READY_S = 20.0
_OWN = ("mount -t tmpfs tmpfs /dev/shm", "mkdir -p /tmp/ray", "mount -t tmpfs tmpfs /tmp/ray", "exec sleep infinity")


@dataclass(frozen=True)
class Host:
    """A host that runs; `pid` is of its first process, as this machine sees it."""

    name: str
    address: str
    pid: int
    _switch: str
    _port: str

    def command(self, command: Sequence[str]) -> list[str]:
        """`command` as a command of this machine that runs on the host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", *command]

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start something that goes on; it ends with its host at the latest."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                self.command(command), stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=_environment(env)
            )

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run something to its end.

        Raises:
            subprocess.CalledProcessError: it failed, and `check`.
        """
        return subprocess.run(
            self.command(command), capture_output=True, text=True, env=_environment(env), timeout=timeout, check=check
        )

    def plug(self, plugged: bool = True) -> None:
        """Put the host's cable in, or take it out."""
        _ip("-n", self._switch, "link", "set", self._port, "up" if plugged else "down")

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        self.plug(False)
        try:
            yield
        finally:
            self.plug()

    def listening(self) -> list[tuple[str, int]]:
        """(address, port) of everything on the host that listens for TCP."""
        code = (
            "import json, psutil; print(json.dumps(sorted({tuple(c.laddr) for c in psutil.net_connections('tcp')"
            " if c.status == psutil.CONN_LISTEN})))"
        )
        return [(address, port) for address, port in json.loads(self.run([sys.executable, "-c", code]).stdout)]


@contextmanager
def network(names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """Hosts of these names, in this order from SUBNET.1 on, on one switch."""
    tag = f"kt{os.getpid()}"
    switch = f"{tag}-switch"
    with ExitStack() as stack:
        _namespace(switch, stack)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        yield {
            name: stack.enter_context(_host(name, f"{SUBNET}.{number}", tag, switch))
            for number, name in enumerate(names, 1)
        }


@contextmanager
def _host(name: str, address: str, tag: str, switch: str) -> Iterator[Host]:
    space, port = f"{tag}-{name}", f"to-{name}"
    with ExitStack() as stack:
        _namespace(space, stack)
        _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", "; ".join(_OWN)]
        holder = subprocess.Popen(["ip", "netns", "exec", space, *own])
        stack.callback(_end, holder)
        yield Host(name, address, _first_process(holder), switch, port)


def _first_process(holder: subprocess.Popen[bytes]) -> int:
    """Of the host: the one that does nothing once everything is mounted."""

    def found() -> int | None:
        children = psutil.Process(holder.pid).children(recursive=True)
        return next((child.pid for child in children if child.name() == "sleep"), None)

    if not wait_until(lambda: found() is not None, READY_S):
        raise RuntimeError("a host did not come up: see what unshare and mount said")
    pid = found()
    assert pid is not None
    return pid


def _end(holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.wait()


def _namespace(name: str, stack: ExitStack) -> None:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "delete", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **(extra or {})}
