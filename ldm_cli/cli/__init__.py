"""The command line: load a recipe, call one stage, show its result. Typer and Rich live here alone."""

from __future__ import annotations

from typing import NoReturn

from ldm_cli.training.interruption import hold_signals


def main() -> NoReturn:
    """The console script. Signals wait until it is known whether the command saves before it stops."""
    hold_signals()
    from ldm_cli.cli import app

    app.main()
