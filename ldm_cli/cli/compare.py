"""`ldm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_result
from ldm_cli.cli.startup import importing
from ldm_cli.errors import UsageError

_SET = "A folder of pictures, shards, or a .npz file of statistics"


def command(
    generated: Annotated[str, given.argument("A", f"{_SET}: the pictures that are judged.")],
    real: Annotated[str | None, given.argument("B", f"{_SET}: the reference.")] = None,
    metrics: Annotated[str, typer.Option("--metrics", metavar="fid,kid,prdc,is,cmmd", help="What to measure.")] = "fid",
    inception: Annotated[
        Path | None, given.option("--inception", metavar="FILE", text="Weights of FID's network, in safetensors.")
    ] = None,
    clip: Annotated[Path | None, given.option("--clip", metavar="DIR", text="CLIPModel folder, for cmmd.")] = None,
    preprocessing: Annotated[
        str,
        typer.Option(
            "--preprocessing", metavar="pytorch-fid|clean|torch-fidelity", help="Prepare pictures as this program does."
        ),
    ] = "torch-fidelity",
    save_statistics: Annotated[
        Path | None,
        given.option("--save-statistics", metavar="FILE", text="Keep the statistics of B, or of A alone, as .npz."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Pictures per call.")] = 50,
    device: given.Device = "auto",
    overwrite: given.Overwrite = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Measure how far a set of pictures is from another: FID, KID, precision, recall, CMMD; and Inception scores."""
    from ldm_cli.evaluation.config import PICTURE_METRICS, PREPROCESSINGS

    wanted = tuple(dict.fromkeys(name.strip() for name in metrics.split(",")))
    for name, values, allowed in (
        ("--metrics", wanted, PICTURE_METRICS),
        ("--preprocessing", (preprocessing,), PREPROCESSINGS),
    ):
        if unknown := [value for value in values if value not in allowed]:
            raise UsageError(f"unknown {name} '{unknown[0]}'", remedy=f"it takes {', '.join(allowed)}")
    with importing():
        from ldm_cli.stages import compare

    options = compare.CompareOptions(
        cast("Any", wanted),
        inception,
        clip,
        cast("Any", preprocessing),
        batch_size,
        device,
        save_statistics,
        overwrite,
    )
    result = compare.run(generated, real, options, make_reporter())
    show_result(result if json else _for_people(result), json)


def _for_people(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers and the sets; the JSON holds the whole provenance."""
    provenance = result.pop("provenance")
    sets = {name: provenance[name] for name in ("generated", "real") if name in provenance}
    shown = ("source", "num_pictures", "sha256")
    return {**result, "measured": {name: {key: one.get(key) for key in shown} for name, one in sets.items()}}
