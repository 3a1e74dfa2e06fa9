"""`ldm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.launch import become_ranks, is_first_rank, make_rank_reporter
from ldm_cli.cli.show import show_result
from ldm_cli.cli.startup import importing
from ldm_cli.errors import UsageError


def command(
    context: typer.Context,
    sets: Annotated[
        list[str],
        given.argument(
            "SET",
            "A, the pictures that are judged, then B, the reference: folders of pictures, shards, or .npz files of "
            "statistics. Or any number of results of ldm eval (.json), side by side.",
        ),
    ],
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="fid,kid,prdc,is,cmmd,fd_dinov2", help="What to measure.")
    ] = "fid",
    inception: Annotated[
        Path | None, given.option("--inception", metavar="FILE", text="Weights of FID's network, in safetensors.")
    ] = None,
    clip: Annotated[Path | None, given.option("--clip", metavar="DIR", text="CLIPModel folder, for cmmd.")] = None,
    dinov2: Annotated[Path | None, given.option("--dinov2", metavar="DIR", text="Dinov2Model, for fd_dinov2.")] = None,
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
    nproc: given.NumProcesses = None,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Measure how far a set of pictures is from another: FID, KID, precision, recall, CMMD; and Inception scores."""
    if all(name.endswith(".json") for name in sets):
        _show_results(sets, json)
        return
    if len(sets) > 2:
        raise UsageError(f"{len(sets)} sets are given", remedy="compare two, or .json results of ldm eval")
    become_ranks(context.obj, nproc)
    wanted = tuple(dict.fromkeys(name.strip() for name in metrics.split(",")))
    _check_words(wanted, preprocessing)
    with importing():
        from ldm_cli.stages import compare

    options = compare.CompareOptions(
        *(cast("Any", wanted), inception, clip, dinov2, cast("Any", preprocessing)),
        *(batch_size, device, save_statistics, overwrite),
    )
    result = compare.run(sets[0], sets[1] if len(sets) == 2 else None, options, make_rank_reporter())
    if is_first_rank():
        show_result(result if json else _for_people(result), json)


def _for_people(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers and the sets; the JSON holds the whole provenance."""
    provenance = result.pop("provenance")
    sets = {name: provenance[name] for name in ("generated", "real") if name in provenance}
    shown = ("source", "num_pictures", "sha256")
    return {**result, "measured": {name: {key: one.get(key) for key in shown} for name, one in sets.items()}}


def _check_words(metrics: tuple[str, ...], preprocessing: str) -> None:
    """Refuse unknown names of metrics and programs."""
    from ldm_cli.evaluation.config import PICTURE_METRICS, PREPROCESSINGS

    for name, values, allowed in (
        ("--metrics", metrics, PICTURE_METRICS),
        ("--preprocessing", (preprocessing,), PREPROCESSINGS),
    ):
        if unknown := [value for value in values if value not in allowed]:
            raise UsageError(f"unknown {name} '{unknown[0]}'", remedy=f"it takes {', '.join(allowed)}")


def _show_results(files: list[str], json: bool) -> None:
    """Results of `ldm eval`: for people a row for each number and a column for each result."""
    from ldm_cli.stages import compare_results

    table = compare_results.run([Path(file) for file in files])
    results = table["results"]
    names = [name for name in results[0]["numbers"] if not name.endswith("_interval")]
    rows = [{"number": name, **{one["name"]: one["numbers"].get(name) for one in results}} for name in names]
    show_result(table if json else {"numbers": rows, "not_compared": table["not_compared"]}, json)
