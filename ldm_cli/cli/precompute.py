"""`ldm precompute`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.launch import become_ranks, is_first_rank, make_rank_reporter
from ldm_cli.cli.show import show_result
from ldm_cli.cli.startup import importing
from ldm_cli.errors import UsageError

_DTYPES = ("fp32", "fp16", "bf16")
_COMMANDS = ("train-unet", "train-ar", "train-prior")


def command(
    context: typer.Context,
    recipe: given.RecipeName,
    overrides: given.Overrides = None,
    dtype: Annotated[
        str | None,
        given.option(
            "--dtype",
            metavar="fp32|fp16|bf16",
            text="Type of the stored numbers: fp32 changes no result, the others take half the space.",
        ),
    ] = None,
    out: Annotated[Path | None, given.out("the recipe's cache, or cache beside the shards")] = None,
    device: given.Device = "auto",
    max_time: given.MaxTime = None,
    overwrite: given.Overwrite = False,
    nproc: given.NumProcesses = None,
    dry_run: given.DryRun = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Encode the data of a recipe of train-unet, train-ar or train-prior once; `cache: DIR` then trains on these."""
    changes, limit = given.check_overrides(overrides), given.seconds(max_time)
    if dtype not in (None, *_DTYPES):
        raise UsageError(f"unknown --dtype '{dtype}'", remedy="it takes " + ", ".join(_DTYPES))
    become_ranks(context.obj, nproc, dry_run)
    from ldm_cli.recipe.load import load_recipe

    loaded: Any = load_recipe(recipe, changes)
    if loaded.recipe.command not in _COMMANDS:
        remedy = f"give a recipe for {' or '.join(_COMMANDS)}"
        raise UsageError(f"'{recipe}' is a {loaded.recipe.command} recipe", "it has nothing to encode", remedy)
    with importing():
        from ldm_cli.stages import precompute  # imports torch: a faulty recipe is refused before
        from ldm_cli.stages.support.options import RunOptions

    options = RunOptions(out, device, max_time=limit, recipe_text=loaded.text, overwrite=overwrite)
    do: Any = precompute.dry_run if dry_run else precompute.run
    result = do(loaded.recipe, options, make_rank_reporter(), dtype)
    if is_first_rank():
        show_result(result, json)
