"""The commands and their order. On a terminal help has colours and frames; in a pipe it is plain text."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .. import __version__
from . import bench, case, doctor, explain, run_files, verify, view

HELP = "Exact attention in O(n) memory: measure it, run it on files, see its plan, check it."


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code."""
    try:
        code = _app()(arguments, prog_name="tilefold", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # Typer's own errors about the command line know how to say themselves; where their class lives has moved.
        if not hasattr(error, "format_message"):
            raise
        raise ValueError(_asked(error)) from None
    if code == 130:  # how newer versions of Typer hand on Ctrl-C; older ones abort
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _app() -> typer.Typer:
    markup: Any = "rich" if sys.stdout.isatty() else None
    app = typer.Typer(
        help=HELP,
        rich_markup_mode=markup,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    app.command("bench")(bench.bench)
    app.command("run")(run_files.run)
    app.command("view")(view.view)
    app.command("explain")(explain.explain)
    app.command("doctor")(doctor.doctor)
    app.command("verify")(verify.verify)
    app.command("case")(case.case)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        print(f"tilefold {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _asked(error: Any) -> str:
    sentence = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{sentence} (see {context.command_path} --help)" if context is not None else sentence
