"""`ldm spiral`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_result


def command(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder.")] = Path("spiral"),
    seed: Annotated[int, typer.Option("--seed", metavar="K", min=0, help="Same seed, same lesson.")] = 0,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Training steps.")] = 1500,
    guidance: Annotated[
        float, typer.Option("--guidance", metavar="SCALE", min=1.01, max=20, help="Guidance scale; compared with none.")
    ] = 3.0,
    overwrite: given.Overwrite = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Learn how diffusion works: a model in two dimensions, plotted on one page."""
    from ldm_cli.stages import spiral

    result = spiral.run(out, seed, steps, guidance, make_reporter(), overwrite=overwrite)
    show_result(result if json else _for_people(result), json)


def _for_people(result: dict[str, Any]) -> dict[str, Any]:
    """The measures and the path of the page."""
    return {name: result[name] for name in ("methods", "field", "guidance")} | {"page": result["files"]["page"]}
