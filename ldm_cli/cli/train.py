"""`ldm train-clip` and the other trainers: one command for all, and the stage of its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.launch import become_ranks, is_first_rank, make_rank_reporter
from ldm_cli.cli.show import show_dry_run, show_result
from ldm_cli.cli.startup import importing
from ldm_cli.errors import UsageError
from ldm_cli.training.interruption import release_signals

COMMANDS = {
    "train-clip": "Train CLIP on image-text shards; writes a CLIPModel folder with its tokenizer.",
    "train-vae": "Train an image autoencoder on shards; writes an AutoencoderKL or VQModel folder.",
    "train-unet": "Train a text-to-image denoiser in the space of a VAE; writes a pipeline folder.",
    "train-ar": "Train an autoregressive text-to-image model on the codes of a VQ model; writes a folder for sample.",
    "train-prior": "Train unCLIP's prior, from captions to CLIP's image embeddings; ldm convert joins it to a decoder.",
}
"""Command → its help."""


def command(
    context: typer.Context,
    recipe: given.RecipeName,
    overrides: given.Overrides = None,
    out: Annotated[Path | None, given.out("runs/NAME, by the recipe's name")] = None,
    device: given.Device = "auto",
    resume: given.Resume = "auto",
    max_time: given.MaxTime = None,
    nproc: given.NumProcesses = None,
    data_trace: given.DataTrace = None,
    dry_run: given.DryRun = False,
    measure: given.Measure = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Train the model of a recipe for this command."""
    changes, limit = given.check_overrides(overrides), given.seconds(max_time)
    become_ranks(context.obj, nproc, dry_run)
    from ldm_cli.recipe.load import load_recipe

    name = str(context.info_name)
    loaded = load_recipe(recipe, changes, expected_command=name)
    with importing():
        from ldm_cli.stages.support.options import RunOptions  # imports torch: a faulty recipe is refused before

    options = RunOptions(out, device, resume, limit, data_trace=data_trace, recipe_text=loaded.text)
    if measure and not dry_run:
        raise UsageError("--measure needs --dry-run", remedy="add --dry-run, or leave --measure out")
    if dry_run:
        release_signals()
        show_dry_run(loaded, json, max(1, nproc or 1), device if measure else None)
        return
    result = _run(name, loaded.recipe, options)
    if is_first_rank():
        show_result(result, json)


def _run(name: str, recipe: Any, options: Any) -> dict[str, Any]:
    """Run the stage of a command; only that one is imported."""
    reporter = make_rank_reporter()
    with importing():
        from ldm_cli.stages import trainer_stage

        stage = trainer_stage(name)
    result: dict[str, Any] = stage.run(recipe, options, reporter)
    return result
