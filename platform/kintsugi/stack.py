"""The record of a local stack, and the variables with which a program uses it.

Everything about a stack is in one folder, its home: `stack.json` (addresses and process ids), `credentials.json` and
`ray-token` (readable by their owner only), `logs/`, and `s3/`, the store's data, which outlives the stack.
"""

import json
import os
import secrets
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from kintsugi import processes
from kintsugi.errors import StackError
from kintsugi.processes import ProcessRecord, State
from kintsugi.storage import open_store

CONFLICTING = {"AWS_ENDPOINT_URL": ("AWS_PROFILE", "AWS_SESSION_TOKEN"), "RAY_AUTH_MODE": ("RAY_AUTH_TOKEN",)}
"""Variables that would win over those of `environment`."""


@dataclass(frozen=True)
class Ports:
    """Where the parts listen; 0 picks a free port. `endpoint` is only recorded: Ray Serve binds it later."""

    s3: int = 8333
    dashboard: int = 8265
    tensorboard: int = 6006
    gcs: int = 6379
    endpoint: int = 8000


class Stack(BaseModel):
    """A recorded stack. `s3_endpoint` is None where the user brought a store; `scratch` goes with the stack."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    s3_endpoint: str | None
    store_uri: str
    ray_address: str
    dashboard: str
    tensorboard: str
    endpoint: str
    scratch: Path
    processes: dict[str, ProcessRecord] = {}

    @property
    def parts(self) -> list[str]:
        return [*(["s3"] if self.s3_endpoint else []), "ray", "tensorboard"]

    def state(self, part: str) -> State:
        record = self.processes.get(part)
        return processes.state(record) if record else "stopped"


def home_folder() -> Path:
    """`KINTSUGI_HOME`, or `.kintsugi` in the working directory."""
    return Path(os.environ.get("KINTSUGI_HOME") or ".kintsugi")


def find(home: Path) -> Stack | None:
    """The recorded stack, whether or not its processes still run.

    Raises:
        StackError: the record cannot be read.
    """
    path = record_file(home)
    try:
        return Stack.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        raise StackError(f"{path} cannot be read: stop by hand what runs from its time, and delete it") from error


def save(home: Path, stack: Stack) -> None:
    _write_private(record_file(home), stack.model_dump_json(indent=2).encode())


def environment(stack: Stack, home: Path) -> dict[str, str]:
    """The variables with which any program uses the stack."""
    return _store_environment(stack, home) | _ray_environment(stack, home)


def activate(home: Path) -> Stack | None:
    """Put the recorded stack into this process's environment, except where the user chose another store or cluster."""
    stack = find(home)
    if stack is None:
        return None
    chosen: dict[str, str] = {}
    if own_store() is None:
        chosen |= _store_environment(stack, home)
    if os.environ.get("RAY_ADDRESS", stack.ray_address) == stack.ray_address and stack.state("ray") == "running":
        chosen |= _ray_environment(stack, home)
    apply(chosen, os.environ)
    return stack


def apply(variables: dict[str, str], target: MutableMapping[str, str]) -> None:
    """Set `variables` in `target`, and take out what would win over them."""
    for name, rivals in CONFLICTING.items():
        for rival in rivals if name in variables else ():
            target.pop(rival, None)
    target.update(variables)


def own_store() -> str | None:
    """The store that the user named; None if there is none, or if it came from `activate`."""
    uri = os.environ.get("KINTSUGI_STORE")
    return open_store(uri).uri if uri and "KINTSUGI_LOCAL_STORE" not in os.environ else None


def write_credentials(home: Path) -> None:
    """SeaweedFS's identity file, readable by its owner only. One that exists stays, as the store's data does."""
    if credentials_file(home).exists():
        return
    keys = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_urlsafe(32)}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "kintsugi", "credentials": [keys], "actions": actions}
    _write_private(credentials_file(home), json.dumps({"identities": [identity]}).encode())


def write_token(home: Path) -> str:
    """A new 256-bit token for Ray, readable by its owner only."""
    token = secrets.token_hex(32)
    _write_private(token_file(home), token.encode())
    return token


def record_file(home: Path) -> Path:
    return home / "stack.json"


def credentials_file(home: Path) -> Path:
    return home / "credentials.json"


def token_file(home: Path) -> Path:
    return home / "ray-token"


def log_file(home: Path, part: str) -> Path:
    return home / "logs" / f"{part}.log"


def _write_private(path: Path, data: bytes) -> None:
    """Write beside `path` and rename; mkstemp makes the file with mode 0600, so that it is never open to others."""
    handle, part = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _credentials(home: Path) -> tuple[str, str]:
    """Access key and secret key of the local S3 server."""
    path = credentials_file(home)
    try:
        keys = json.loads(path.read_bytes())["identities"][0]["credentials"][0]
        return str(keys["accessKey"]), str(keys["secretKey"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StackError(f"{path} cannot be read: run 'kintsugi down', delete it, and run 'kintsugi up'") from error


def _store_environment(stack: Stack, home: Path) -> dict[str, str]:
    if not stack.s3_endpoint:
        return {"KINTSUGI_STORE": stack.store_uri}
    access_key, secret_key = _credentials(home)
    return {
        "KINTSUGI_STORE": stack.store_uri,
        "KINTSUGI_LOCAL_STORE": "1",
        "AWS_ENDPOINT_URL": stack.s3_endpoint,
        "AWS_ENDPOINT_URL_S3": stack.s3_endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        **_without_proxy(),
    }


def _ray_environment(stack: Stack, home: Path) -> dict[str, str]:
    """Ray replaces 127.0.0.1 by the machine's outer address, and binds that, unless RAY_ENABLE_..._CLUSTER is 0."""
    return {
        "RAY_ADDRESS": stack.ray_address,
        "RAY_API_SERVER_ADDRESS": stack.dashboard,
        "RAY_DASHBOARD_ADDRESS": stack.dashboard,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file(home).absolute()),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        **_without_proxy(),
    }


def _without_proxy() -> dict[str, str]:
    hosts = (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",")
    names = ",".join(dict.fromkeys([*filter(None, hosts), "127.0.0.1", "localhost"]))
    return {"NO_PROXY": names, "no_proxy": names}
