"""`ldm bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_result
from ldm_cli.errors import UsageError

if TYPE_CHECKING:
    from ldm_cli.recipe.train_recipe import StartedRecipe, TrainRecipe

_SUBJECTS = "train-clip|train-vae|train-unet|precompute|sample|data|published|all"


def command(
    subject: Annotated[str, given.argument("SUBJECT", _SUBJECTS.replace("|", ", "))],
    arguments: Annotated[
        list[str] | None, given.argument("RECIPE|KEY=VALUE", "Recipe of another model, and changes to it.")
    ] = None,
    against: Annotated[
        str, given.option("--against", metavar="PEER,…", text="diffusers, transformers, webdataset or all.")
    ] = "",
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="Turns of each contender after warm-up.")
    ] = 5,
    model: Annotated[str | None, given.option("--model", metavar="DIR", text="Pipeline folder of sample.")] = None,
    images: Annotated[int | None, given.option("-n", metavar="N", least=1, text="Images of sample and data.")] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps of sample.")] = 50,
    out: Annotated[Path | None, given.option("--out", metavar="FILE", text="Also write the JSON here.")] = None,
    device: given.Device = "auto",
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Measure speed and memory, beside a matrix product of this machine and beside other libraries."""
    if subject not in _SUBJECTS.split("|"):
        raise UsageError(f"unknown subject '{subject}'", remedy=f"one of {_SUBJECTS.replace('|', ', ')}")
    recipe, changes = _split(arguments)
    from ldm_cli.bench import run as bench
    from ldm_cli.formats.json_file import write_json
    from ldm_cli.recipe.load import load_recipe
    from ldm_cli.stages.support.options import resolve_device
    from ldm_cli.stages.support.start import resolve_start

    peers = bench.check_peers(subject, [name for name in against.split(",") if name])
    models = {name: known for name, known in bench.SUBJECTS.items() if known.recipe and subject in (name, "all")}
    if (recipe or changes) and subject not in models:
        raise UsageError(f"bench {subject} takes no recipe", remedy="see ldm bench --help")
    where, reporter = resolve_device(device), make_reporter()
    recipes: dict[str, TrainRecipe] = {}
    for name, known in models.items():
        loaded = load_recipe(recipe or known.recipe, changes, expected_command=known.command)
        recipes[name] = resolve_start(cast("StartedRecipe", loaded.recipe), reporter.warn)
    options = bench.BenchOptions(peers, rounds, where.type, model, images, steps)
    result = bench.run(subject, recipes, options, reporter)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
    show_result(result, json)


def _split(arguments: list[str] | None) -> tuple[str | None, tuple[str, ...]]:
    """The recipe's name, if the first argument is one, and the changes."""
    words = list(arguments or ())
    recipe = words.pop(0) if words and "=" not in words[0] else None
    return recipe, given.check_overrides(words)
