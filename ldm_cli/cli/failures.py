"""From any exception to an exit code and one line on stderr."""

from __future__ import annotations

import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import typer

from ldm_cli import __version__
from ldm_cli.cli.launch import send_to_launcher
from ldm_cli.cli.report import work_done
from ldm_cli.cli.streams import write_line
from ldm_cli.errors import LdmError, Preempted, RecipeError, UsageError, as_ldm_error, first_line, without_secrets

READER_GONE = 141


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an exception that is no failure, such as a finished `--help` or a closed stdout; else None."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        return READER_GONE
    # Rich answers a broken pipe with SystemExit(1); nothing else here exits that way.
    if isinstance(error, SystemExit):
        return READER_GONE if error.code == 1 else int(error.code or 0)
    return None


def report(error: BaseException, arguments: Sequence[str], debug: bool, stopped_by: int = 0) -> int:
    """Write the failure as the last line on stderr and return the exit code.

    Args:
        error: the exception that ended the command.
        arguments: the command line.
        debug: whether to show the traceback.
        stopped_by: the signal that `error` is a reaction to; 0: none.
    """
    if debug:
        for line in "".join(traceback.format_exception(error)).splitlines():
            write_line(line)
    if stopped_by or isinstance(error, KeyboardInterrupt | typer.Abort):
        number = stopped_by or signal.SIGINT
        if (remedy := _same_command(arguments)) is None:
            word = "interrupted" if number == signal.SIGINT else "terminated"
            write_line(f"ldm: error: {word}: received {signal.Signals(number).name} [E-INTERRUPTED]")
            return 128 + number
        place = f"at {done}" if (done := work_done()) else "before the first part of the work"
        error = Preempted(f"stopped {place}", f"received {signal.Signals(number).name}", remedy)
    failure = user_error(error) or _bug(error, arguments)
    lines = _problems(failure) if isinstance(failure, RecipeError) and failure.problems else [f"ldm: error: {failure}"]
    if not send_to_launcher(lines):
        for line in lines:
            write_line(line)
    return failure.code


def _same_command(arguments: Sequence[str]) -> str | None:
    """What the same command does after a signal; None for commands that are over in a moment, or are not repeated."""
    goes_on, starts_again = "run the same command again to go on", "nothing is kept: the same command starts again"
    named = " ".join(arguments[:2])
    if named.startswith("eval ") and not any(argument.startswith("--out") for argument in arguments):
        return f"{starts_again}, and with --out DIR it would go on"
    if named.startswith(("sample ", "eval ", "precompute ")) or named in ("data synth", "data index"):
        return goes_on
    return starts_again if named.startswith("data ") else None


def user_error(error: BaseException) -> LdmError | None:
    """The error to report for any exception; None if it is a bug of ours."""
    # Click's exceptions, under whatever name this version of Typer has them.
    format_message = getattr(error, "format_message", None)
    if callable(format_message):
        return _usage_error(error, " ".join(str(format_message()).split()))
    return as_ldm_error(error)


def _usage_error(error: BaseException, message: str) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ldm"
    message = message.rstrip(".")
    remedy = f"see {path} --help"
    option = getattr(error, "option_name", "")
    if message.startswith("No such command") and (command := _command_meant(message.split("'")[1])):
        message, remedy = message.partition(". Did you mean")[0], f"write ldm {command}, or {remedy}"
    if meant := option and _instead_of(option.lstrip("-"), path.rpartition(" ")[2]):
        message, remedy = f"no such option: {option}", f"write {meant}, or {remedy}"
    return UsageError(message[:1].lower() + message[1:], remedy=remedy)


def _command_meant(word: str) -> str | None:
    """The command that other programs call `word`."""
    from ldm_cli.recipe.other_names import command_called

    return command_called(word)


def _instead_of(option: str, command: str) -> str | None:
    """What people mean by an option that a command does not have: a field of its recipe, or another option."""
    from ldm_cli.recipe.other_names import field_called, option_called
    from ldm_cli.recipe.schema import RECIPES

    if command not in RECIPES:
        return None
    if (meant := option_called(option)) is not None:
        return meant
    field = field_called(option, RECIPES[command])
    return field and f"{field}=VALUE"


def _problems(error: RecipeError) -> list[str]:
    if len(error.problems) == 1:
        return [f"ldm: error: {error.problems[0]} [{error.tag}]"]
    return [*error.problems, f"ldm: error: {error}"]


def _bug(error: BaseException, arguments: Sequence[str]) -> LdmError:
    """A bug of ours, with its traceback in a file; without environment variables, which may hold tokens."""
    torch = sys.modules.get("torch")
    lines = [
        f"ldm {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {getattr(torch, '__version__', 'not loaded')}",
        f"arguments: {[without_secrets(argument) for argument in arguments]!r}",
        "",
        *traceback.format_exception(error),
    ]
    try:
        descriptor, name = tempfile.mkstemp(prefix="ldm-crash-", suffix=".txt")
        os.close(descriptor)
        Path(name).write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
        remedy = f"this is a bug; please report it with '{name}'"
    except OSError:
        remedy = "this is a bug; run again with --debug for the traceback"
    return LdmError(f"unexpected {type(error).__name__}", first_line(error), remedy)
