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


def test_leaving_waits_for_threads_runs_exit_functions_and_flushes() -> None:
    result = python("""
import atexit, sys, threading, time
from ldm_cli.cli.startup import leave
atexit.register(lambda: print("exit function"))
def late():
    time.sleep(0.2)
    print("thread")
threading.Thread(target=late).start()
print("main")
try:
    leave(7)
finally:
    print("never")
""")
    assert (result.returncode, result.stdout, result.stderr) == (7, "main\nthread\nexit function\n", "")


def test_imports_are_not_searched_for_cycles_and_later_objects_are() -> None:
    result = python("""
import gc
from ldm_cli.cli.startup import importing
try:
    with importing():
        assert not gc.isenabled()
        raise ImportError
except ImportError:
    assert gc.isenabled() and gc.get_freeze_count() > 1000
gc.disable()
with importing():
    pass
assert not gc.isenabled()
""")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are loaded ahead on Linux")
@pytest.mark.parametrize(
    ("arguments", "loaded"), [(["train-unet", "--help"], False), (["data", "stats"], False), (["sample"], True)]
)
def test_torchs_libraries_are_loaded_ahead_by_commands_that_compute(arguments: list[str], loaded: bool) -> None:
    result = python(f"""
import sys, threading
from pathlib import Path
from ldm_cli.cli.app import run
run({arguments!r})
for thread in threading.enumerate()[1:]:
    thread.join()
assert "torch" not in sys.modules
assert ("libtorch_cpu" in Path("/proc/self/maps").read_text()) is {loaded}
import os; os._exit(0)  # the end of a process that has the libraries and no torch is not what is tested
""")
    assert result.returncode == 0, result.stderr


def test_an_interrupt_waits_for_imports_to_end() -> None:
    result = python("""
import os, signal
from ldm_cli.cli.startup import importing
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
