"""The commands put together, and the one place where errors become words."""

from __future__ import annotations

import sys
from typing import Annotated, Protocol, cast

import typer
import typer.main

from dure.cli import (
    asm,
    bench,
    cache,
    chat,
    check,
    compile,
    kernels,
    matrix,
    models,
    perplexity,
    profile,
    pull,
    report,
    run,
    sanitize,
    save,
    score,
    sim,
    targets,
    trace,
    validate,
)
from dure.cli.main import EXIT_USER
from dure.errors import DureError

_ClickException = cast(
    type[Exception],
    next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"),
)
"""The base of every error in the arguments.  Newer versions of typer carry a copy of click of their
own, so that it is found through a class that typer itself exports."""


class _Context(Protocol):
    command_path: str


class _UsageError(Protocol):
    exit_code: int
    ctx: _Context | None

    def format_message(self) -> str: ...


def build() -> typer.Typer:
    """The application with all of its commands."""
    app = typer.Typer(
        name="dure",
        help="dure (두레): one program, every NPU. Runs LLMs from GGUF files on the CPU you have.",
        epilog='Example: dure run smollm2 "Why is the sky blue?"',
        add_completion=False,
        rich_markup_mode=None,  # plain help: rich costs more time than the rest of the command
        pretty_exceptions_enable=False,
        no_args_is_help=True,
    )
    app.callback()(_root)
    modules = (run, chat, pull, models, targets, bench, profile, asm, perplexity, cache)
    chips = (sim, check, compile, sanitize, save, kernels, trace, report, validate, score, matrix)
    for module in (*modules, *chips):
        module.register(app)
    return app


def dispatch(arguments: list[str]) -> int:
    """Parse and run one command line; the exit code.

    What the user got wrong is said on standard error and is code 2.  KeyboardInterrupt and
    BrokenPipeError are the caller's.
    """
    command = typer.main.get_command(build())
    try:
        # Not command.main(): it has its own opinion about Ctrl-C and closed pipes.
        with command.make_context("dure", arguments or ["--help"]) as context:
            command.invoke(context)
        return 0
    except typer.Exit as done:
        return done.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except DureError as error:
        print(f"dure: {error}", file=sys.stderr)
        return EXIT_USER
    except _ClickException as error:
        _explain(cast(_UsageError, error))
        return EXIT_USER


def _explain(error: _UsageError) -> None:
    """One sentence about the arguments, and where to read more."""
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without its command
        print(error.format_message(), file=sys.stderr)
        return
    context = error.ctx
    path = context.command_path if context is not None else "dure"
    print(f"{path}: {error.format_message()}", file=sys.stderr)
    print(f"  fix: see `{path} --help`", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        import dure

        print(f"dure {dure.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    pass
