"""The command line: load a recipe, call one stage, show its result. Typer and Rich live here alone."""

from ldm_cli.cli.app import main

__all__ = ["main"]
