"""The options that several commands share, and the parsers of their values."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm_cli.errors import UsageError
from ldm_cli.storage import expand_home


def option(
    *names: str, text: str, metavar: str | None = None, panel: str | None = None, least: int | None = None
) -> Any:
    """An option whose default is not shown, as it is None or empty."""
    return typer.Option(*names, metavar=metavar, rich_help_panel=panel, min=least, help=text, show_default=False)


def out(default: str) -> Any:
    """`--out`, with what it is by default in words."""
    return option("--out", metavar="DIR", text=f"Output folder; default: {default}.")


def argument(metavar: str, text: str) -> Any:
    """A positional argument whose default is not shown."""
    return typer.Argument(metavar=metavar, help=text, show_default=False)


RecipeName = Annotated[str, argument("RECIPE", "A recipe file, or a shipped one such as demo/clip.")]
Overrides = Annotated[list[str] | None, argument("KEY=VALUE", "Changes to the recipe: train.lr=1e-4")]
Variant = Annotated[
    str | None, option("--variant", metavar="fp16|bf16", text="Weights of a hub's model in this precision.")
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Device to compute on.")]
Resume = Annotated[
    str,
    typer.Option(
        "--resume",
        metavar="auto|never|PATH",
        help="Continue an interrupted run, refuse to, or start where another run or a checkpoint is.",
    ),
]
MaxTime = Annotated[
    str | None, option("--max-time", metavar="TIME", text="Save and stop after 3h, 90m, 1:30:00, ...; default: never.")
]
NumProcesses = Annotated[
    int | None,
    option("--nproc", least=1, metavar="N", text="Use N processes on this machine, one per device; default: 1."),
]
DataTrace = Annotated[
    Path | None, option("--data-trace", metavar="FILE", text="Write a line `step shard key` per sample.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what the command would do, without doing it.")]
Measure = Annotated[bool, typer.Option("--measure", help="With --dry-run: time some steps, and give hours.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]

_TEXT_OPTIONS = frozenset(
    ("-p", "--prompt", "--negative", "--caption-column", "--caption-template", "--prefix", "--text", "--caption")
)
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds(text: str | None) -> float | None:
    """A duration in seconds: `3h`, `1h30m`, `90m`, `45s`, `1:30:00`, `1-12:00:00` (Slurm), or plain seconds.

    >>> seconds("1h30m"), seconds("1:30:00"), seconds("2.5"), seconds(None)
    (5400.0, 5400.0, 2.5, None)

    Raises:
        UsageError: `text` is no positive duration.
    """
    if text is None:
        return None
    total = 0.0
    if re.fullmatch(r"([0-9.]+[dhms])+", text):
        parts = re.findall(r"([0-9.]+)([dhms])", text)
        total = sum(_number(number) * _UNITS[unit] for number, unit in parts)
    elif clock := re.fullmatch(r"(?:([0-9]+)-)?(?:([0-9]+):)?([0-9]+):([0-9]+)", text):
        days, hours, minutes, rest = (int(group or 0) for group in clock.groups())
        total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    else:
        total = _number(text)
    if total <= 0:
        raise UsageError(f"--max-time '{text}' is no duration", remedy="write 3h, 90m, 1:30:00 or seconds")
    return total


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?|\.[0-9]+", text) else 0.0


def weighted_path(text: str) -> tuple[str, float]:
    """`FILE` or `FILE=WEIGHT`; the weight is 1 if none is given.

    >>> weighted_path("a.safetensors=0.7"), weighted_path("a=b.safetensors")
    (('a.safetensors', 0.7), ('a=b.safetensors', 1.0))
    """
    path, _, weight = text.rpartition("=")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def size(text: str | None) -> tuple[int, int] | None:
    """Width and height in pixels from `640x480`, or from `512` for a square.

    Raises:
        UsageError: `text` is no such size.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,5})(?:[xX×]([0-9]{1,5}))?", text)
    if not found:
        raise UsageError(f"--size '{text}' is no size", remedy="write WIDTHxHEIGHT, such as 512x512")
    width = int(found[1])
    return width, int(found[2] or width)


def expand_paths(arguments: Sequence[str]) -> list[str]:
    """The command line with `~` expanded where the shell leaves it, as in `--out=~/run`; texts stay as they are.

    Raises:
        UsageError: an argument is empty and no text: as a path it would be the current folder.
    """
    expanded = []
    for before, argument in zip(("ldm", *arguments), arguments, strict=False):
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if (option or before) in _TEXT_OPTIONS:
            expanded.append(argument)
            continue
        if not value and (equals or not option):
            raise UsageError(f"the argument after '{option or before}' is empty", remedy="is a shell variable unset?")
        expanded.append(f"{option}{equals}{expand_home(value)}")
    return expanded


def is_setting(argument: str, fields: Collection[str]) -> bool:
    """Whether an argument among shards is `key=value`, and no file or address with an `=` in it.

    What is neither a field nor looks like a path counts as a setting, so that a slip in its name is noticed.
    """
    key, equals, value = argument.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key) or Path(argument).exists():
        return False
    return key.partition(".")[0] in fields or not ("/" in value or value.endswith((".tar", "*")))


def check_overrides(overrides: Sequence[str] | None) -> tuple[str, ...]:
    """The trailing arguments, all of the form `key=value`.

    Raises:
        UsageError: one is not.
    """
    for override in overrides or ():
        if "=" not in override:
            raise UsageError(f"unexpected argument '{override}'", "it is not KEY=VALUE", "write e.g. train.lr=1e-4")
    return tuple(overrides or ())
