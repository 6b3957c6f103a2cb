"""The gateway of infra/gateway with the real nginx, on a free port, for tests and benchmarks."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from kintsugi.errors import StackError
from kintsugi.processes import accepts, free_ports, last_lines, wait_until

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra/gateway"
LIMIT_S = 30
"""Neither a start nor an end takes this long, not even on a busy machine."""


def find_nginx() -> Path | None:
    """nginx as `infra/gateway/start` would find it."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", str(ROOT / ".kintsugi/debian/usr/sbin")])
    found = shutil.which("nginx", path=places)
    return Path(found) if found else None


def shipped_settings() -> dict[str, str]:
    """The lines of gateway.env by name."""
    return dict(re.findall(r"^(GATEWAY_\w+)=(.*)$", (INFRA / "gateway.env").read_text(), re.MULTILINE))


class Gateway:
    """nginx in front of `upstreams` (`host:port`), run by `infra/gateway/start`; a context manager.

    Args:
        folder: takes its configuration, its logs (`access.log`, `error.log`, `nginx.log`) and what it buffers.
        certificate: certificate and key (PEM) for TLS; without, plain HTTP.
        tries: how often a request is sent in all.
        start: another copy of `infra/gateway/start`.
        user_id: whom it runs as; default: whoever calls.
        settings: those of gateway.env, in small letters and without the prefix: `max_body="1k"`.
    """

    def __init__(
        self,
        upstreams: Sequence[str],
        folder: Path,
        *,
        certificate: tuple[Path, Path] | None = None,
        tries: int = 3,
        start: Path = INFRA / "start",
        user_id: int | None = None,
        **settings: str,
    ) -> None:
        self.folder = folder
        self.port = free_ports(1)[0]
        self.address = f"{'https' if certificate else 'http'}://127.0.0.1:{self.port}"
        self._start = start
        self._user_id = user_id
        self._settings = self._defaults(upstreams, certificate, tries) | {
            f"GATEWAY_{name.upper()}": value for name, value in settings.items()
        }
        unknown = self._settings.keys() - shipped_settings().keys()
        if unknown:
            raise StackError(f"gateway.env knows no {', '.join(sorted(unknown))}: look for the name there")
        self._process: subprocess.Popen[bytes] | None = None

    def _defaults(self, upstreams: Sequence[str], certificate: tuple[Path, Path] | None, tries: int) -> dict[str, str]:
        # nginx tries each entry once: an address that is to be tried again is listed again.
        entries = [*upstreams, *(upstreams * tries)[len(upstreams) : tries]]
        tls = "ssl_certificate {}; ssl_certificate_key {};".format(*certificate) if certificate else ""
        return {
            "GATEWAY_FOLDER": str(self.folder),
            "GATEWAY_USER": "root" if os.geteuid() == 0 else "nobody",
            "GATEWAY_WORKERS": "1",
            "GATEWAY_LISTEN": f"127.0.0.1:{self.port}" + (" ssl http2" if certificate else ""),
            "GATEWAY_TLS": tls,
            "GATEWAY_UPSTREAMS": " ".join(f"server {entry} max_fails=0;" for entry in entries),
            "GATEWAY_TRIES": str(tries),
            "GATEWAY_ACCESS_LOG": str(self.folder / "access.log"),
            "GATEWAY_ERROR_LOG": f"{self.folder / 'error.log'} crit",
            # All that a test or a benchmark sends comes from one address.
            "GATEWAY_CONNECTIONS": "4096",
            "GATEWAY_REQUESTS_PER_ADDRESS": "1000",
            "GATEWAY_KEY_RATE": "10000r/s",
            "GATEWAY_KEY_BURST": "10000",
            "GATEWAY_ADDRESS_RATE": "10000r/s",
            "GATEWAY_ADDRESS_BURST": "10000",
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def process_id(self) -> int:
        """Of nginx's master process."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    def start(self) -> None:
        """Returns once it takes connections.

        Raises:
            StackError: nginx is not there or refuses the settings.
        """
        log = self.folder / "nginx.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [str(self._start)],
                env={**os.environ, **self._settings},
                stdout=stream,
                stderr=stream,
                user=self._user_id,
                group=self._user_id,
                extra_groups=[] if self._user_id is not None else None,
            )
        self._process = process
        wait_until(lambda: process.poll() is not None or accepts(self.port), LIMIT_S)
        if process.poll() is not None or not accepts(self.port):
            self.stop()
            raise StackError(f"the gateway does not start: {last_lines(log)}")

    def stop(self) -> None:
        """Ends it at once; requests under way are cut off."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
