"""`ldm sample`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_plan, show_result
from ldm_cli.errors import InputNotFoundError, RecipeError, UsageError
from ldm_cli.reporting import Reporter

if TYPE_CHECKING:
    from ldm_cli.recipe.load import LoadedRecipe
    from ldm_cli.recipe.schema import SampleRecipe

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE|KEY=VALUE",
        help="A recipe, and changes to it; both optional.",
        show_default=False,
    ),
]
_QUIET: dict[str, Any] = {"show_default": False}


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("sample", rich_help_panel="Models")(_sample)


def _sample(
    arguments: Arguments = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Pipeline or run folder.", **_QUIET)
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.", **_QUIET)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="A file with a prompt per line.", **_QUIET),
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", metavar="TEXT", help="What to avoid.")] = None,
    number: Annotated[int | None, typer.Option("-n", metavar="N", help="Images per prompt.", **_QUIET)] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="S", help="Image i of a prompt has seed S + i.", **_QUIET)
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="Denoising steps.", **_QUIET)] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", metavar="NAME", help="ddpm, ddim, euler or dpmpp_2m.", **_QUIET)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", metavar="G", help="Classifier-free guidance scale.", **_QUIET),
    ] = None,
    eta: Annotated[
        float | None, typer.Option("--eta", metavar="E", help="DDIM: 0 no noise, 1 as DDPM.", **_QUIET)
    ] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Image size in pixels.", **_QUIET)] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="B", help="Images at a time; changes no image.", **_QUIET),
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option("--latents", metavar="FILE", help="Initial noise: safetensors, key 'latents'.", **_QUIET),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="P", help="fp32, bf16 or fp16.", **_QUIET)
    ] = None,
    out: given.Out = None,
    device: given.Device = "auto",
    overwrite: given.Overwrite = False,
    dry_run: given.DryRun = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Draw pictures from prompts with a pipeline folder, ours or one of diffusers."""
    recipe, changes = _split(arguments or [])
    pixels = given.size(size)
    fields = (
        ("--model", "model", None if model is None else str(model)),
        ("--negative", "sampling.negative", None if negative is None else _clean(negative)),
        ("-n", "sampling.images_per_prompt", number),
        ("--seed", "sampling.seed", seed),
        ("--steps", "sampling.steps", steps),
        ("--sampler", "sampling.sampler", sampler),
        ("--guidance", "sampling.guidance.scale", guidance),
        ("--eta", "sampling.eta", eta),
        ("--size", "sampling.width", pixels and pixels[0]),
        ("--size", "sampling.height", pixels and pixels[1]),
        ("--batch-size", "sampling.batch_size", batch_size),
        ("--precision", "sampling.precision", precision),
    )
    if recipe is None and model is None and not any(change.startswith("model=") for change in changes):
        raise UsageError("no model given", remedy="add --model DIR, or a recipe")
    loaded = _load(recipe, changes, [field for field in fields if field[2] is not None])
    reporter = make_reporter()
    loaded = _with_prompts(loaded, _read_prompts(prompts, reporter) + [_clean(text) for text in prompt or ()])
    from ldm_cli.stages.options import RunOptions

    options = RunOptions(out, device, recipe_text=loaded.text, overrides=changes, overwrite=overwrite)
    if dry_run:
        show_plan(loaded, json)
        return
    from ldm_cli.stages import sample

    show_result(sample.run(cast("SampleRecipe", loaded.recipe), options, reporter, latents_file=latents), json)


def _split(arguments: list[str]) -> tuple[str | None, tuple[str, ...]]:
    """The recipe, if the first argument is one, and the changes."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], given.check_overrides(arguments[1:])
    return None, given.check_overrides(arguments)


def _load(recipe: str | None, changes: tuple[str, ...], fields: list[tuple[str, str, Any]]) -> LoadedRecipe:
    """The recipe with options applied; if only options are wrong, it is the command line that is wrong."""
    from ldm_cli.recipe.load import load_recipe

    try:
        return load_recipe(recipe, changes, expected_command="sample", options=fields)
    except RecipeError as error:
        if error.problems and all(problem.startswith("option ") for problem in error.problems):
            raise UsageError("; ".join(error.problems), remedy="see ldm sample --help") from None
        raise


def _with_prompts(loaded: LoadedRecipe, prompts: list[str]) -> LoadedRecipe:
    """The recipe's own prompts, then `prompts`."""
    recipe = cast("SampleRecipe", loaded.recipe)
    together = (*recipe.prompts, *prompts)
    if not together:
        raise UsageError("no prompt given", remedy="add -p TEXT, --prompts FILE, or prompts to the recipe")
    return dataclasses.replace(loaded, recipe=recipe.model_copy(update={"prompts": together}))


def _clean(text: str) -> str:
    """An argument whose bytes were not UTF-8 has surrogates for them; they become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_prompts(path: Path | None, reporter: Reporter) -> list[str]:
    """The lines of a prompts file that are not blank.

    Raises:
        InputNotFoundError: the file cannot be read.
    """
    if path is None:
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputNotFoundError(f"cannot read prompts '{path}'", (error.strerror or "").lower()) from None
    prompts = []
    for number, raw in enumerate(lines, start=1):
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8", "replace").strip()
        if "\N{REPLACEMENT CHARACTER}" in text:
            reporter.warn(f"'{path}' line {number} is not UTF-8: what cannot be read becomes U+FFFD")
        if text:
            prompts.append(text)
    return prompts
