"""The command line: load a recipe, call one stage, show its result. Only this package uses Typer and Rich."""

from __future__ import annotations

from typing import NoReturn

from ldm_cli.training.interruption import hold_signals


def main() -> NoReturn:
    """The console script. It holds signals until the command decides whether to save before it stops."""
    hold_signals()
    from ldm_cli.cli import app

    app.main()
