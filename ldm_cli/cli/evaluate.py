"""`ldm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.launch import become_ranks, is_first_rank, make_rank_reporter
from ldm_cli.cli.show import show_dry_run, show_result
from ldm_cli.cli.startup import importing

if TYPE_CHECKING:
    from ldm_cli.recipe.schema import EvalRecipe


def command(
    context: typer.Context,
    recipe: given.RecipeName,
    overrides: given.Overrides = None,
    out: Annotated[
        Path | None, given.option("--out", metavar="DIR|FILE.json", text="Keep the result here; default: only show it.")
    ] = None,
    device: given.Device = "auto",
    overwrite: given.Overwrite = False,
    nproc: given.NumProcesses = None,
    dry_run: given.DryRun = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Measure trained models on shards: CLIP score, zero-shot, retrieval, reconstruction, ..."""
    changes = given.check_overrides(overrides)
    become_ranks(context.obj, nproc, dry_run)
    from ldm_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, changes, expected_command="eval")
    with importing():
        from ldm_cli.stages.support.options import RunOptions  # imports torch: a faulty recipe is refused before

    options = RunOptions(out, device, recipe_text=loaded.text, overwrite=overwrite)
    if dry_run:
        show_dry_run(loaded, json)
        return
    with importing():
        from ldm_cli.stages import evaluate

    result = evaluate.run(cast("EvalRecipe", loaded.recipe), options, make_rank_reporter())
    if is_first_rank():
        show_result(result if json else _for_people(result), json)


def _for_people(result: dict[str, Any]) -> dict[str, Any]:
    """The metrics and the data they were measured on; the JSON holds the whole provenance."""
    shown = dict(result["metrics"])
    if points := result.get("points"):
        shown["points"] = [{"pipeline": one["pipeline"], **one["settings"], **_numbers(one)} for one in points]
    return {**shown, "measured_on": result["provenance"]["data"]}


def _numbers(point: dict[str, Any]) -> dict[str, Any]:
    """The main numbers of a point of a sweep, by short names."""
    metrics = point["metrics"]
    found = {"clip_score": metrics["clip_score"]["generated"]["clip_score"]} if "clip_score" in metrics else {}
    for values in (values for name, values in metrics.items() if name not in ("clip_score", "attribute_accuracy")):
        found |= {n: v for n, v in values.items() if isinstance(v, float) and not n.endswith(("_std", "_infinity"))}
    rates = metrics.get("attribute_accuracy", {}).get("generated", {}).get("all", {})
    return found | {name: rates[name] for name in ("shape_and_color", "pair_shape_and_color") if name in rates}
