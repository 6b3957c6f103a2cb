"""The command line: a table of verbs whose code is loaded when one of them runs, and the exit codes.

0 done, 1 a KintsugiError (one sentence on stderr), 2 usage, 130 interrupted.
"""

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from kintsugi import __version__
from kintsugi.errors import KintsugiError

Table = Mapping[str, tuple[str, str]]

COMMANDS: Table = {
    "up": (
        "kintsugi.commands.stack:up",
        "Start the local stack: an S3 server, a Ray head with its dashboard, TensorBoard.",
    ),
    "down": ("kintsugi.commands.stack:down", "Stop exactly what 'kintsugi up' started."),
    "status": ("kintsugi.commands.stack:status", "Print every address of the local stack and what runs."),
    "doctor": ("kintsugi.commands.doctor:doctor", "Say what is open, missing or old, and how to mend it."),
    "demo": (
        "kintsugi.demo:demo",
        "Go the whole way on this machine: data, training, search, endpoint, one restored image.",
    ),
    "data build": ("kintsugi.commands.data:build", "Build a dataset in the store from a folder of images."),
    "data inspect": ("kintsugi.commands.data:inspect", "Say what a dataset holds."),
    "train": ("kintsugi.commands.train:train", "Train on Ray, then evaluate and publish the model."),
    "evaluate": ("kintsugi.commands.evaluate:evaluate", "Score a model on a dataset."),
    "detector train": ("kintsugi.commands.detector:train", "Train a segmenter that judges how well defects are found."),
    "tune": ("kintsugi_tune.commands:tune", "Search settings with Ray Tune, then publish the best model."),
    "tune report": ("kintsugi_tune.commands:report", "Write what a search found as one HTML page."),
    "tune publish": (
        "kintsugi_tune.commands:publish",
        "Publish a trial of a search; promote it if it is not worse.",
    ),
    "tune dashboard": ("kintsugi_tune.commands:dashboard", "Show searches in optuna-dashboard."),
    "models list": ("kintsugi.commands.models:list_", "List the published models, their versions and aliases."),
    "models show": ("kintsugi.commands.models:show", "Show a version's config and scorecard."),
    "models promote": ("kintsugi.commands.models:promote", "Point an alias at a version."),
    "models rollback": ("kintsugi.commands.models:rollback", "Point an alias back at the version before."),
    "restore": ("kintsugi.commands.restore:restore", "Restore an image file or a folder, here or by a service."),
    "export": ("kintsugi.commands.export:export", "Write a model as ONNX, for HALCON, OpenVINO, TensorRT and others."),
    "serve": ("kintsugi_serve.commands:serve", "Serve a model over HTTP with Ray Serve."),
    "serve key": ("kintsugi_serve.commands:key", "Make a key for callers of the service."),
    "submit": ("kintsugi.commands.submit:submit", "Run a verb as a job on the Ray cluster, and follow it."),
    "jobs list": ("kintsugi.commands.jobs:list_", "List the jobs of the cluster."),
    "jobs logs": ("kintsugi.commands.jobs:logs", "Show the log of a job until it has ended."),
    "jobs stop": ("kintsugi.commands.jobs:stop", "End a job."),
    "batch": ("kintsugi_serve.batches.commands:batch", "Restore every image under a prefix, with a ledger."),
}
GROUPS = {
    "data": "Datasets: build and inspect.",
    "detector": "What judges whether defects can be found.",
    "jobs": "Jobs on the cluster: list, follow, stop.",
    "models": "The registry: list, show, promote, roll back.",
}
_VERBOSE = "kintsugi.verbose"


class LazyCommand(TyperCommand):
    """A line of the help page; the function behind it is imported when the command runs."""

    def __init__(self, name: str, target: str, help_line: str) -> None:
        super().__init__(name, help=help_line)
        self.target = target

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        command: Any = _single(resolve(self.target))
        command.params += [option for option in parent.find_root().command.params if option.name == "verbose"]
        return command.make_context(info_name, args, parent=parent, **extra)


class RootGroup(TyperGroup):
    """Turns a KintsugiError of any command into one sentence and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KintsugiError as error:
            if ctx.meta.get(_VERBOSE):
                traceback.print_exception(error)
            print(f"error: {_sentence(error)}", file=sys.stderr)
            raise typer.Exit(1) from error


def main(args: Sequence[str] | None = None, commands: Table = COMMANDS) -> int:
    """Run one command line and return its exit code."""
    try:
        build_app(commands).main(sys.argv[1:] if args is None else args, prog_name="kintsugi")
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    else:
        code = 0
    return _flushed(code)


def build_app(commands: Table = COMMANDS) -> TyperGroup:
    """The command tree of a table; importing none of its modules."""
    root: Any = _single(_root, cls=RootGroup)
    for path, (target, help_line) in commands.items():
        group, _, name = path.rpartition(" ")
        if group and not isinstance(root.commands.get(group), TyperGroup):
            root.add_command(_group(group, root.commands.get(group)))
        (root.commands[group] if group else root).add_command(LazyCommand(name, target, help_line))
    return root


class VerbGroup(TyperGroup):
    """A verb of its own, `kintsugi tune SPACE`, with others below it, `kintsugi tune report`."""

    def __init__(self, own: LazyCommand) -> None:
        super().__init__(name=own.name, help=own.help)
        self.own = own

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Its options are its own command's, not the group's.
        below = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if below else ["--", *(args or ["--help"])])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args) if args[0] in self.commands else ("", self.own, args)


def _group(name: str, own: LazyCommand | None) -> TyperGroup:
    return VerbGroup(own) if own else TyperGroup(name=name, help=GROUPS.get(name), no_args_is_help=True)


def resolve(target: str) -> Any:
    """The function that `package.module:function` names."""
    module, _, function = target.partition(":")
    return getattr(import_module(module), function)


def _single(function: Any, cls: type[TyperGroup] | None = None) -> Any:
    app = typer.Typer(add_completion=False)
    if cls is None:
        app.command()(function)
    else:
        settings = {"help_option_names": ["-h", "--help"]}
        app.callback(cls=cls, no_args_is_help=True, context_settings=settings)(function)
    return get_command(app)


def _remember_verbose(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.meta[_VERBOSE] = True


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"kintsugi {__version__}")
        raise typer.Exit


def _root(
    verbose: Annotated[
        bool,
        typer.Option(
            "-v", "--verbose", expose_value=False, callback=_remember_verbose, help="Show the traceback of an error."
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", expose_value=False, is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Restore degraded inspection images without losing or inventing a defect: train, search and serve on Ray."""


def _sentence(error: KintsugiError) -> str:
    """Ray raises a double of the error whose text is a remote traceback, and keeps the error itself as `cause`."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, KintsugiError) else error)


def _flushed(code: int) -> int:
    """The reader of a pipe may be gone; the interpreter must not find that out again while it exits."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
