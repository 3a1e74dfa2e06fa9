"""`ldm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_result


def command(
    runs: Annotated[list[Path], given.argument("RUN", "Folders of training runs, runs/NAME, and of ldm eval.")],
    out: Annotated[
        Path | None,
        given.option("--out", metavar="FILE", text="The page; else report.html in the run, or here for several runs."),
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option("--watch", metavar="SECONDS", min=1, help="Write the page again while a run goes on."),
    ] = None,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Show runs on one page: curves, sample grids through time, what differs in their recipes, evaluations."""
    from ldm_cli.stages import report

    show_result(report.run(runs, report.ReportOptions(out, watch), make_reporter()), json)
