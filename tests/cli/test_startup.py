"""The program starts fast, whole, and without what it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ldm_cli import __version__
from tests.conftest import REPOSITORY, Ldm

HEAVY = {"torch", "pydantic", "webdataset", "tokenizers", "PIL", "yaml", "safetensors", "numpy", "matplotlib"}


def test_help_lists_every_command(ldm: Ldm) -> None:
    result = ldm("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for command in ("train-clip", "train-vae", "train-unet", "sample", "eval", "data", "recipe"):
        assert command in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train-unet", "--help"], ["data", "synth", "-h"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    # Newer versions of Typer themselves use pydantic for the options of a command.
    heavy = HEAVY if len(arguments) == 1 else HEAVY - {"pydantic"}
    code = f"""
import sys
from ldm_cli.cli.app import run
assert run({arguments!r}) == 0
print(*sorted({{name.split(".")[0] for name in sys.modules}} & {heavy!r}), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout
    assert result.stderr.strip() == ""


def test_the_version_is_the_packages(ldm: Ldm) -> None:
    assert ldm("--version").stdout == f"ldm {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train-clip"],
        ["train-vae"],
        ["train-unet"],
        ["sample"],
        ["eval"],
        *(["data", command] for command in ("synth", "pack", "check", "stats", "index")),
        *(["recipe", command] for command in ("list", "show", "check", "schema")),
    ],
)
def test_every_command_explains_itself_in_a_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    from ldm_cli.cli.app import run

    assert run([*arguments, "--help"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert f"Usage: ldm {' '.join(arguments)}" in captured.out


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_an_interrupt_waits_for_imports_to_end() -> None:
    result = python("""
import os, signal
from ldm_cli.cli.startup import importing
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background
try:
    with importing():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            print("imported")
        except BaseException:
            print("a library forgot the interrupt")
    print("never")
except KeyboardInterrupt:
    print("interrupted")
""")
    assert result.stdout == "imported\ninterrupted\n"
