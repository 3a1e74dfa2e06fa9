"""`ldm sample`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli import sample_arguments as arg
from ldm_cli.cli.launch import become_ranks, is_first_rank, make_rank_reporter
from ldm_cli.cli.show import show_dry_run, show_result
from ldm_cli.cli.startup import importing
from ldm_cli.errors import RecipeError, UsageError
from ldm_cli.reporting import Reporter

if TYPE_CHECKING:
    from ldm_cli.pictures.job import PromptEntry
    from ldm_cli.recipe.load import LoadedRecipe
    from ldm_cli.recipe.sample_recipe import SampleRecipe


def command(
    context: typer.Context,
    arguments: arg.Arguments = None,
    model: arg.Model = None,
    variant: given.Variant = None,
    prompt: arg.Prompt = None,
    prompts: arg.Prompts = None,
    negative: arg.Negative = None,
    number: arg.Number = None,
    seed: arg.Seed = None,
    steps: arg.Steps = None,
    sampler: arg.Sampler = None,
    guidance: arg.Guidance = None,
    eta: arg.Eta = None,
    temperature: arg.Temperature = None,
    top_k: arg.TopK = None,
    top_p: arg.TopP = None,
    best_of: arg.BestOf = None,
    clip: arg.Clip = None,
    size: arg.Size = None,
    batch_size: arg.BatchSize = None,
    long_prompts: arg.LongPrompts = None,
    clip_skip: arg.ClipSkip = None,
    latents: arg.Latents = None,
    precision: arg.Precision = None,
    compiled: arg.Compiled = None,
    init: arg.Init = None,
    strength: arg.Strength = None,
    mask: arg.Mask = None,
    extend: arg.Extend = None,
    style: arg.Style = None,
    image: arg.Image = None,
    from_text: arg.FromText = None,
    to_text: arg.ToText = None,
    variation: arg.Variation = None,
    tile: arg.Tile = None,
    upscale: arg.Upscale = None,
    upscale_noise: arg.UpscaleNoise = None,
    interpolate: arg.Interpolate = None,
    xy: arg.XY = None,
    preview_every: arg.PreviewEvery = None,
    preview_vae: arg.PreviewVae = None,
    image_format: arg.ImageFormat = None,
    metadata: arg.Metadata = None,
    lora: arg.Lora = None,
    lora_dir: arg.LoraDir = None,
    embedding: arg.Embedding = None,
    image_prompt: arg.ImagePrompt = None,
    ip_adapter: arg.IPAdapter = None,
    image_encoder: arg.ImageEncoder = None,
    wildcards: arg.Wildcards = None,
    repeat: arg.Repeat = None,
    out: arg.Out = None,
    device: given.Device = "auto",
    overwrite: given.Overwrite = False,
    nproc: given.NumProcesses = None,
    dry_run: given.DryRun = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Generate pictures from prompts and from other pictures, with a pipeline folder of ours or of diffusers."""
    _sample(context)


def _sample(context: typer.Context) -> None:
    values = context.params
    become_ranks(context.obj, values["nproc"], values["dry_run"])
    reporter = make_rank_reporter()
    loaded, provenance = _recipe(context, reporter)
    if values["dry_run"]:
        show_dry_run(loaded, values["json"])
        return
    out, latents = values["out"], values["latents"]
    result = _run(loaded, out, values["device"], values["overwrite"], reporter, latents, provenance)
    if is_first_rank():
        show_result(result, values["json"])


def _recipe(context: typer.Context, reporter: Reporter) -> tuple[LoadedRecipe, dict[str, Any] | None]:
    """The recipe with options, changes and prompts, and the settings of the picture of `--repeat`."""
    values = context.params
    recipe, changes = _split(values["arguments"] or [])
    provenance = None if values["repeat"] is None else _provenance(values["repeat"], recipe)
    loaded = _load(recipe, changes, arg.recipe_fields(context), provenance)
    prompts = _read_prompts(values["prompts"], values["prompt"] or [], reporter)
    recipe_of_pictures = cast("SampleRecipe", loaded.recipe)
    if not prompts and not recipe_of_pictures.model and not recipe_of_pictures.prompts:
        from ldm_cli.pictures.job import PromptEntry

        once: dict[str, Any] = {} if values["number"] is not None else {"images_per_prompt": 1}
        prompts = [PromptEntry(prompt="", sampling=once)]
    return _with_prompts(loaded, prompts, provenance), provenance


def _run(
    loaded: LoadedRecipe,
    out: Path | None,
    device: str,
    overwrite: bool,
    reporter: Reporter,
    latents: Path | None,
    provenance: dict[str, Any] | None,
) -> dict[str, Any]:
    with importing():
        from ldm_cli.stages import sample
        from ldm_cli.stages.support.options import RunOptions
        from ldm_cli.stages.support.picture_generator import Latents

    noise = None if latents is None else Latents(latents)
    if provenance is not None and noise is None and "latents" in provenance.get("sources", {}):
        noise = Latents(Path(provenance["sources"]["latents"]), provenance.get("latents_row"))
    options = RunOptions(out, device, recipe_text=loaded.text, overwrite=overwrite)
    return sample.run(cast("SampleRecipe", loaded.recipe), options, reporter, noise, provenance)


def _split(arguments: list[str]) -> tuple[str | None, tuple[str, ...]]:
    """The recipe, if the first argument is one, and the changes."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], given.check_overrides(arguments[1:])
    return None, given.check_overrides(arguments)


def _provenance(picture: Path, recipe: str | None) -> dict[str, Any]:
    """The settings that are stored in the picture of `--repeat`."""
    if recipe is not None:
        raise UsageError(f"--repeat and the recipe '{recipe}'", "a picture brings its own", "leave one of them out")
    from ldm_cli.pictures.provenance import repeatable_provenance

    return repeatable_provenance(picture)


def _load(
    recipe: str | None, changes: tuple[str, ...], fields: list[tuple[str, str, Any]], provenance: dict[str, Any] | None
) -> LoadedRecipe:
    """The recipe with options applied. Where only options are wrong, the error is one of the command line."""
    from ldm_cli.recipe.load import load_recipe

    has_model = (
        recipe is not None
        or provenance is not None
        or any(field in ("model", "upscale.model") for _, field, _ in fields)
    )
    if not has_model and not any(change.startswith(("model=", "upscale.model=")) for change in changes):
        raise UsageError("no model given", remedy="add --model DIR, or a recipe")
    base = None
    if provenance is not None:
        from ldm_cli.pictures.provenance import recipe_of  # imports torch

        base = recipe_of(provenance)
    try:
        return load_recipe(recipe, changes, expected_command="sample", options=fields, base=base)
    except RecipeError as error:
        if error.problems and all(problem.startswith("option ") for problem in error.problems):
            raise UsageError(
                "; ".join(map(arg.in_words_of_options, error.problems)), remedy="see ldm sample --help"
            ) from None
        raise


def _with_prompts(
    loaded: LoadedRecipe, prompts: list[str | PromptEntry], provenance: dict[str, Any] | None
) -> LoadedRecipe:
    """Add `prompts` to those of the recipe; with `--repeat`, they replace the picture's prompt."""
    recipe = cast("SampleRecipe", loaded.recipe)
    together = (*recipe.prompts, *prompts) if provenance is None or not prompts else tuple(prompts)
    if not together and recipe.edit.embedded:
        together = ("",)
    if not together:
        raise UsageError("no prompt given", remedy="add -p TEXT, --prompts FILE, or prompts to the recipe")
    return dataclasses.replace(loaded, recipe=recipe.model_copy(update={"prompts": together}))


def _read_prompts(path: Path | None, texts: list[str], reporter: Reporter) -> list[str | PromptEntry]:
    """The prompts of a file, then `texts`; warns of options in these."""
    if path is None and not texts:
        return []
    texts = [arg.readable(text) for text in texts]
    from ldm_cli.pictures.prompt_files import read_prompt_file, stray_option

    if stray := next((text for text in texts if stray_option(text)), None):
        reporter.warn(f"'{stray_option(stray)}' is part of the prompt '{stray}': see ldm sample --help for options")
    found = [] if path is None else list(read_prompt_file(path, reporter.warn))
    if path is not None and not found:
        raise UsageError(f"no prompt in '{path}'", remedy="write one per line, or name a table's column 'prompt'")
    return [*found, *texts]
