"""kintsugi jobs list, logs, stop."""

from datetime import datetime
from typing import Annotated

import typer

from kintsugi.commands.console import Json, print_json, print_table, say
from kintsugi.commands.submit import Address, choose_cluster, tell
from kintsugi.jobs import RayJobs, find_job

Name = Annotated[str, typer.Argument(metavar="ID", help="Name of a job, as 'kintsugi submit' gave it.")]


def list_(address: Address = None, as_json: Json = False) -> None:
    """List the jobs that the cluster knows, oldest first."""
    jobs = RayJobs(choose_cluster(address)).jobs()
    if as_json:
        print_json([job.to_dict() for job in jobs])
        return
    rows = [(job.name, job.state.lower(), "" if job.code is None else job.code, _clock(job.started)) for job in jobs]
    print_table(("job", "state", "exit code", "started"), rows)


def logs(name: Name, address: Address = None, as_json: Json = False) -> None:
    """Show a job's log from its beginning until the job has ended, and end with its exit code."""
    server = RayJobs(choose_cluster(address))
    tell(server, find_job(server, name), new=True, wait=True, as_json=as_json)


def stop(name: Name, address: Address = None, as_json: Json = False) -> None:
    """End a job: SIGTERM to its command, SIGKILL where that does not help."""
    server = RayJobs(choose_cluster(address))
    job = find_job(server, name)
    stopped = not job.ended and server.stop(name)
    if as_json:
        print_json({"id": name, "stopped": stopped})
    else:
        say(f"job {name} is being stopped" if stopped else f"job {name} had ended already ({job.state.lower()})")


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
