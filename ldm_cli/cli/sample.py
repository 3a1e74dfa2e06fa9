"""`ldm sample`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.launch import bind_to_launcher, expect_as_many, is_first_rank, is_rank, launch, warn_of_copies
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_plan, show_result
from ldm_cli.cli.startup import importing
from ldm_cli.errors import RecipeError, UsageError
from ldm_cli.reporting import Reporter, SilentReporter

if TYPE_CHECKING:
    from ldm_cli.pictures.job import PromptEntry
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
_EDITING: dict[str, Any] = {**_QUIET, "rich_help_panel": "Working on a picture"}
_SHOWING: dict[str, Any] = {**_QUIET, "rich_help_panel": "How results are shown"}


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("sample", rich_help_panel="Models")(_sample)


def _sample(
    context: typer.Context,
    arguments: Arguments = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Pipeline or run folder.", **_QUIET)
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.", **_QUIET)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="A file of prompts: .txt, .json, .jsonl, .csv or .tsv.", **_QUIET
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", metavar="TEXT", help="What to avoid.")] = None,
    number: Annotated[int | None, typer.Option("-n", metavar="N", help="Images per prompt.", **_QUIET)] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="S", help="Image i of a prompt has seed S + i.", **_QUIET)
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="Denoising steps.", **_QUIET)] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", metavar="NAME", help="ddim, euler, dpmpp_2m, unipc, …", **_QUIET)
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
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the model: worth it for many pictures.", **_QUIET),
    ] = None,
    init: Annotated[str | None, typer.Option("--init", metavar="IMAGE", help="Picture to work on.", **_EDITING)] = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", metavar="S", help="0 keeps the picture, 1 forgets what is drawn anew.", **_EDITING),
    ] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", metavar="IMAGE", help="White is drawn anew, black stays.", **_EDITING)
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option("--extend", metavar="L,T,R,B", help="Pixels to draw beyond each edge; or one number.", **_EDITING),
    ] = None,
    style: Annotated[
        str | None, typer.Option("--style", metavar="IMAGE", help="Picture that lends its style.", **_EDITING)
    ] = None,
    variation: Annotated[
        float | None,
        typer.Option("--variation", metavar="V", help="0 to 1: images stay this close to the first.", **_EDITING),
    ] = None,
    tile: Annotated[
        int | None, typer.Option("--tile", metavar="PX", help="Draw larger pictures in windows of PX.", **_EDITING)
    ] = None,
    interpolate: Annotated[
        int | None, typer.Option("--interpolate", metavar="N", help="N pictures from prompt to prompt.", **_SHOWING)
    ] = None,
    xy: Annotated[
        list[str] | None,
        typer.Option("--xy", metavar="FIELD=A,B,…", help="Grid over a field; twice for two.", **_SHOWING),
    ] = None,
    preview_every: Annotated[
        int | None, typer.Option("--preview-every", metavar="N", help="Look at every N-th step.", **_SHOWING)
    ] = None,
    image_format: Annotated[
        str | None, typer.Option("--format", metavar="F", help="png, jpg or webp.", **_SHOWING)
    ] = None,
    metadata: Annotated[
        bool | None,
        typer.Option("--metadata/--no-metadata", help="Whether pictures say how they were drawn.", **_SHOWING),
    ] = None,
    wildcards: Annotated[
        str | None, typer.Option("--wildcards", metavar="DIR", help="Word lists for __name__ in prompts.", **_QUIET)
    ] = None,
    repeat: Annotated[
        Path | None,
        typer.Option("--repeat", metavar="IMAGE", help="Draw a picture again; options change it.", **_QUIET),
    ] = None,
    out: given.Out = None,
    device: given.Device = "auto",
    overwrite: given.Overwrite = False,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, metavar="N", help="Draw with N processes, one per device.", **_QUIET),
    ] = None,
    dry_run: given.DryRun = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Draw pictures from prompts, and from other pictures, with a pipeline folder, ours or one of diffusers."""
    if is_rank():
        expect_as_many(nproc)
        bind_to_launcher()
    elif nproc is not None and nproc > 1 and not dry_run:
        raise typer.Exit(launch(context.obj, nproc))
    recipe, changes = _split(arguments or [])
    pixels, edges = given.size(size), _edges(extend)
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
        ("--compile", "sampling.compile", compiled),
        ("--init", "edit.image", init),
        ("--strength", "edit.strength", strength),
        ("--mask", "edit.mask", mask),
        ("--extend", "edit.extend", edges),
        ("--style", "edit.style", style),
        ("--variation", "variation", variation),
        ("--tile", "tile", tile),
        ("--interpolate", "interpolate", interpolate),
        ("--xy", "xy", xy or None),
        ("--preview-every", "preview_every", preview_every),
        ("--format", "format", image_format),
        ("--metadata", "metadata", metadata),
        ("--wildcards", "wildcards", wildcards),
    )
    options_given = [field for field in fields if field[2] is not None]
    record = None if repeat is None else _record(repeat, recipe)
    has_model = recipe is not None or record is not None or any(key == "model" for _, key, _ in options_given)
    if not has_model and not any(change.startswith("model=") for change in changes):
        raise UsageError("no model given", remedy="add --model DIR, or a recipe")
    loaded = _load(recipe, changes, options_given, record)
    reporter = make_reporter() if is_first_rank() else SilentReporter()
    warn_of_copies(reporter)
    texts = [_clean(text) for text in prompt or ()]
    loaded = _with_prompts(loaded, _read_prompts(prompts, texts, reporter), record)
    with importing():
        from ldm_cli.stages.support.options import RunOptions

    options = RunOptions(out, device, recipe_text=loaded.text, overrides=changes, overwrite=overwrite)
    if dry_run:
        show_plan(loaded, json)
        return
    with importing():
        from ldm_cli.stages import sample

    noise = None if latents is None else sample.Latents(latents)
    if record is not None and noise is None and "latents" in record.get("sources", {}):
        noise = sample.Latents(Path(record["sources"]["latents"]), record.get("latents_row"))
    result = sample.run(cast("SampleRecipe", loaded.recipe), options, reporter, noise, record)
    if is_first_rank():
        show_result(result, json)


def _split(arguments: list[str]) -> tuple[str | None, tuple[str, ...]]:
    """The recipe, if the first argument is one, and the changes."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], given.check_overrides(arguments[1:])
    return None, given.check_overrides(arguments)


def _edges(text: str | None) -> list[int] | None:
    """`--extend 32` or `--extend 0,0,32,0` as pixels beyond the left, top, right and bottom edge."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) not in (1, 4) or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--extend '{text}' is not understood", remedy="write LEFT,TOP,RIGHT,BOTTOM or one number")
    return [int(part) for part in parts] * (4 // len(parts))


def _record(picture: Path, recipe: str | None) -> dict[str, Any]:
    """How the picture of `--repeat` was drawn."""
    if recipe is not None:
        raise UsageError(f"--repeat and the recipe '{recipe}'", "a picture brings its own", "leave one of them out")
    from ldm_cli.formats.png_metadata import read_record

    return read_record(picture)


def _load(
    recipe: str | None, changes: tuple[str, ...], fields: list[tuple[str, str, Any]], record: dict[str, Any] | None
) -> LoadedRecipe:
    """The recipe with options applied; if only options are wrong, it is the command line that is wrong."""
    from ldm_cli.recipe.load import load_recipe

    base = None
    if record is not None:
        from ldm_cli.pictures.provenance import recipe_of  # imports torch

        base = recipe_of(record)
    try:
        return load_recipe(recipe, changes, expected_command="sample", options=fields, base=base)
    except RecipeError as error:
        if error.problems and all(problem.startswith("option ") for problem in error.problems):
            raise UsageError("; ".join(error.problems), remedy="see ldm sample --help") from None
        raise


def _with_prompts(
    loaded: LoadedRecipe, prompts: list[str | PromptEntry], record: dict[str, Any] | None
) -> LoadedRecipe:
    """The recipe's own prompts, then `prompts`; instead of the prompt of a picture that is repeated."""
    recipe = cast("SampleRecipe", loaded.recipe)
    together = (*recipe.prompts, *prompts) if record is None or not prompts else tuple(prompts)
    if not together:
        raise UsageError("no prompt given", remedy="add -p TEXT, --prompts FILE, or prompts to the recipe")
    return dataclasses.replace(loaded, recipe=recipe.model_copy(update={"prompts": together}))


def _clean(text: str) -> str:
    """An argument whose bytes were not UTF-8 has surrogates for them; they become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_prompts(path: Path | None, texts: list[str], reporter: Reporter) -> list[str | PromptEntry]:
    """The prompts of a file, then `texts`; warns of options in these."""
    if path is None and not texts:
        return []
    from ldm_cli.pictures.prompt_files import read_prompt_file, stray_option

    if stray := next((text for text in texts if stray_option(text)), None):
        reporter.warn(f"'{stray_option(stray)}' is part of the prompt '{stray}': see ldm sample --help for options")
    return [*(read_prompt_file(path, reporter.warn) if path else ()), *texts]
