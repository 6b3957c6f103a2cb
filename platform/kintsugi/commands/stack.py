"""kintsugi up, down, status."""

from typing import Annotated

import typer

from kintsugi import local
from kintsugi.commands.console import Json, note, print_json, print_table, say


def up(
    s3_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8333,
    dashboard_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8265,
    tensorboard_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 6006,
    ray_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 6379,
    endpoint_port: Annotated[int, typer.Option(help="Where 'kintsugi serve' will listen; 0 picks a free one.")] = 8000,
    cpus: Annotated[int | None, typer.Option(help="CPUs that Ray may use; default: all.")] = None,
) -> None:
    """Start the local stack: an S3 server, a Ray head with its dashboard, TensorBoard."""
    ports = local.Ports(
        s3=s3_port, dashboard=dashboard_port, tensorboard=tensorboard_port, gcs=ray_port, endpoint=endpoint_port
    )
    local.up(local.home_folder(), ports, cpus=cpus, progress=note)
    status()


def down() -> None:
    """Stop exactly what 'kintsugi up' started; the store's data stays."""
    stopped = local.down(local.home_folder(), progress=note)
    say(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


def status(as_json: Json = False) -> None:
    """Print every address of the local stack and what runs."""
    rows = local.status(local.home_folder())
    if as_json:
        print_json([{"name": name, "state": state, "address": address} for name, state, address in rows])
        return
    if not rows:
        say("no local stack is recorded here: 'kintsugi up' starts one")
        return
    print_table(("", "state", "address"), rows)
