"""The `kintsugi serve` verb: puts a published model behind HTTP on the cluster."""

import importlib
import json
import logging
import re
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from pydantic import ValidationError

from kintsugi import cluster, doors, local
from kintsugi.commands.console import Json, print_json, say
from kintsugi.config import read_override
from kintsugi.errors import ConfigError, ModelNotFound, StackError
from kintsugi.processes import wait_until
from kintsugi.storage import open_store, store_uri_from_environment
from kintsugi_serve.access.keys import TENANT, new_key, read_keys
from kintsugi_serve.schemas import Args

APP = "kintsugi"
DEFAULT_PORT = 8000
START_TIMEOUT_S = 180.0
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def serve(
    model: Annotated[str | None, typer.Option(metavar="NAME[@ALIAS|@NUMBER]", help="A published model.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the one 'kintsugi up' recorded, else 8000.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    min_replicas: Annotated[int, typer.Option(min=0)] = 1,
    max_replicas: Annotated[int, typer.Option(min=1)] = 2,
    every_node: Annotated[
        bool,
        typer.Option("--every-node", help="Listen on every node with a replica, so that callers do not need the head."),
    ] = False,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file of the keys that open it ('kintsugi serve key').")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting of serve/application.yaml; repeatable."),
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Take the service down.")] = False,
    as_json: Json = False,
) -> None:
    """Serve a published model over HTTP with autoscaling replicas; it stays up until --stop."""
    stack = local.activate(local.home_folder())
    if stop:
        stopped = _stop()
        _print({"stopped": stopped}, "the service is down" if stopped else "no service was running", as_json)
        return
    audit_folder = str(local.home_folder().absolute() / "audit") if stack else None
    args = _arguments(model, host, min_replicas, max_replicas, keys, audit_folder, sets or ())
    port = port or (urlsplit(stack.endpoint).port if stack else None) or DEFAULT_PORT
    doors.check_store(args.store)
    _check_model(args.store, args.model)
    _check_port(host, port)
    _start(args, host, port, every_node)
    address, *others = _addresses(host, port)
    ready = _wait_until_ready(address, START_TIMEOUT_S)
    for other in others:
        _wait_until_ready(other, START_TIMEOUT_S)
    everywhere = " and ".join([address, *others])
    _print(
        {"address": address, "addresses": [address, *others], "model": ready["model"], "digest": ready["digest"]},
        f"{ready['model']} answers at {everywhere} (a page for people: {address}/, its API: {address}/docs)",
        as_json,
    )


def key(
    tenant: Annotated[str, typer.Argument(help="Whose key it is: a to z, 0 to 9 and '-'.")],
    as_json: Json = False,
) -> None:
    """Make a key, shown once, and its entry for the file of --keys, which holds only the key's hash."""
    if not re.fullmatch(TENANT, tenant):
        raise ConfigError(f"'{tenant}' is no tenant: use a to z, 0 to 9 and '-', up to 63")
    made, digest = new_key()
    entry = f"  - tenant: {json.dumps(tenant)}\n    sha256: {digest}\n    prefixes: []"
    _print({"key": made, "tenant": tenant, "sha256": digest}, f"{made}\n\nkeys:\n{entry}", as_json)


def _arguments(
    model: str | None,
    host: str,
    min_replicas: int,
    max_replicas: int,
    keys: Path | None,
    audit_folder: str | None,
    sets: Iterable[str],
) -> Args:
    if model is None:
        raise ConfigError("--model is needed, for example --model unet@production")
    if min_replicas > max_replicas:
        raise ConfigError(f"--min-replicas ({min_replicas}) is above --max-replicas ({max_replicas}): lower it")
    if host not in _LOOPBACK and keys is None:
        raise ConfigError(f"{host} is open to others: ask for keys with --keys FILE, or stay on 127.0.0.1")
    given: dict[str, Any] = {
        "store": store_uri_from_environment(),
        "model": model,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "keys": read_keys(keys) if keys else (),
        "audit_folder": audit_folder,
    }
    try:
        return Args.model_validate(given | dict(map(read_override, sets)))
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors(include_input=False))
        raise ConfigError(f"{'; '.join(wrong)} (serve/application.yaml shows all settings)") from None


def _check_model(store: str, model: str) -> None:
    from kintsugi.registry import Registry

    try:
        Registry(open_store(store)).resolve(model)
    except ModelNotFound as error:
        raise ModelNotFound(f"nothing to serve: {error}") from error


def _check_port(host: str, port: int) -> None:
    """A service of ours may answer there: then it is updated. Anything else is in the way."""
    try:
        socket.create_connection((_reachable(host), port), timeout=2).close()
    except OSError:
        return
    if not _is_ours(f"http://{_reachable(host)}:{port}"):
        raise StackError(f"port {port} on {host} is taken by another program: stop it, or give --port")


def _is_ours(address: str) -> bool:
    """Ray Serve's own health path answers at its proxy, also before an application runs."""
    import httpx2

    try:
        answer = httpx2.get(f"{address}/-/healthz", timeout=5)
    except httpx2.HTTPError:
        return False
    return answer.text == "success"


def _start(settings: Args, host: str, port: int, every_node: bool) -> None:
    _connect()
    from ray import serve as ray_serve

    from kintsugi_serve.app import build

    options: dict[str, Any] = {"host": host, "port": port, "request_timeout_s": settings.timeout_s + 30}
    ray_serve.start(proxy_location="EveryNode" if every_node else "HeadOnly", http_options=options)
    try:
        ray_serve.run(build(settings), name=APP, route_prefix="/", blocking=False)
    except RuntimeError as error:
        raise StackError(f"the service did not start ({error}): the Ray dashboard shows the replicas' logs") from error


def _addresses(host: str, port: int) -> list[str]:
    """`host`, or, if it stands for all of a node's addresses, every node that has one of Serve's proxies."""
    if _reachable(host) == host:
        return [f"http://{host}:{port}"]
    import ray
    from ray import serve as ray_serve

    if not wait_until(lambda: bool(ray_serve.status().proxies), START_TIMEOUT_S):
        raise StackError(f"no proxy of Ray Serve came up within {START_TIMEOUT_S:.0f} s: see the Ray dashboard")
    proxies = ray_serve.status().proxies
    nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in proxies]
    return [f"http://{f'[{node}]' if ':' in node else node}:{port}" for node in sorted(nodes)]


def _connect() -> None:
    cluster.connect(worker_output=False, writes=False)
    # Importing ray.serve sets its logger's level, so the level is set after that.
    importlib.import_module("ray.serve")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _stop() -> bool:
    """Whether an application was there; Serve's proxy, and with it the port, goes too if nothing else needs it."""
    _connect()
    from ray import serve as ray_serve

    found = APP in ray_serve.status().applications
    if found:
        ray_serve.delete(APP)
    if not ray_serve.status().applications:
        ray_serve.shutdown()
    return found


def _wait_until_ready(address: str, timeout_s: float) -> dict[str, Any]:
    import httpx2

    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < deadline:
        try:
            answer = httpx2.get(f"{address}/readyz", timeout=10)
            if answer.status_code == 200:
                return answer.json()
            last = f"{answer.status_code} {answer.text[:200]}"
        except httpx2.HTTPError as error:
            last = str(error)
        time.sleep(0.2)
    raise StackError(
        f"{address}/readyz was not ready within {timeout_s:.0f} s ({last}): if Ray Serve already runs on another port, "
        "run 'kintsugi serve --stop' first; otherwise look at the replicas' logs in the Ray dashboard"
    )


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _print(document: dict[str, Any], sentence: str, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        say(sentence)
