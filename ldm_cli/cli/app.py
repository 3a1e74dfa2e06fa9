"""The program `ldm`: its commands, and what happens around each of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

from ldm_cli import __version__
from ldm_cli.cli import (
    bench,
    cascade,
    clip,
    compare,
    convert,
    data,
    evaluate,
    options,
    precompute,
    pull,
    recipe,
    run_report,
    sample,
    spiral,
    streams,
    train,
)
from ldm_cli.cli.examples import epilog
from ldm_cli.cli.failures import exit_code_of, report
from ldm_cli.cli.launch import is_rank
from ldm_cli.errors import UsageError
from ldm_cli.training.interruption import InterruptNote, release_signals

_SAVE_WHEN_STOPPED = (*train.COMMANDS, "precompute")

app = typer.Typer(
    name="ldm",
    help="Train, sample and evaluate text-to-image latent diffusion models, from shards to pictures.",
    epilog="Try: ldm recipe list, then ldm train-clip demo/clip --dry-run",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, text in train.COMMANDS.items():
    app.command(name, help=text, epilog=epilog(name), rich_help_panel="Models")(train.command)
_MODELS = {
    "precompute": precompute,
    "cascade": cascade,
    "sample": sample,
    "eval": evaluate,
    "compare": compare,
    "report": run_report,
    "convert": convert,
    "pull": pull,
    "spiral": spiral,
    "bench": bench,
}
for name, module in _MODELS.items():
    app.command(name, epilog=epilog(name), rich_help_panel="Models")(module.command)
app.add_typer(clip.commands, name="clip", rich_help_panel="Models")
for name, group in {"data": data.commands, "recipe": recipe.commands}.items():
    app.add_typer(group, name=name, rich_help_panel="Recipes and data")


def _show_version(wanted: bool) -> None:
    if wanted:
        streams.write_result(f"ldm {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    if context.invoked_subcommand not in _SAVE_WHEN_STOPPED:
        release_signals()
    if context.invoked_subcommand is None:
        raise UsageError("no command given", remedy="see ldm --help")


@cache
def program() -> Any:
    """The commands as click's tree, which takes 50 ms to build."""
    return get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; whatever goes wrong is said in one line on stderr."""
    debug = "--debug" in arguments
    interrupt = InterruptNote()
    try:
        with interrupt:
            streams.prepare()
            if not debug:
                streams.silence_library_warnings()
            # Not program().main(): that turns a broken pipe into exit code 1.
            with program().make_context("ldm", options.expand_paths(arguments), obj=tuple(arguments)) as context:
                program().invoke(context)
            sys.stdout.flush()
    except BaseException as error:
        code = exit_code_of(error)
        if code is None:
            code = report(error, arguments, debug, interrupt.came)
        streams.abandon_stdout()
        return code
    return 0


def main() -> NoReturn:
    """The rest of the console script."""
    code = run(sys.argv[1:])
    if is_rank():  # an orderly end waits for ranks that may be gone, and takes objects from threads of gloo
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
