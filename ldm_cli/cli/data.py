"""`ldm data synth | pack | check | stats | index`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.examples import epilog
from ldm_cli.cli.launch import become_ranks, is_first_rank, make_rank_reporter
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_result
from ldm_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from ldm_cli.data.config import DataConfig

commands = typer.Typer(help="Make shards, and look into them.")
Shards = Annotated[
    list[str],
    given.argument(
        "SHARDS|KEY=VALUE", "Paths, globs or brace patterns; and data settings such as caption=json:caption."
    ),
]
Duplicates = Annotated[
    Path | None,
    given.option("--duplicates", metavar="FILE", text="Find near-duplicates; write those to leave out into FILE."),
]
Against = Annotated[
    str | None, given.option("--against", metavar="SHARDS", text="Find samples that are in these shards as well.")
]
Threshold = Annotated[
    float, typer.Option("--threshold", metavar="F", min=0.5, max=1, help="Similarity from which two are duplicates.")
]
Output = Annotated[Path, given.argument("OUT", "Output folder for the shards.")]


@commands.command(epilog=epilog("data synth"))
def synth(
    out: Output,
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Training samples.")] = 10_000,
    size: Annotated[int, typer.Option("--size", metavar="S", min=32, help="Image size in pixels.")] = 32,
    seed: Annotated[int, typer.Option("--seed", metavar="K", min=0, help="Same seed, same scenes.")] = 0,
    val_samples: Annotated[
        int | None,
        typer.Option("--val-samples", metavar="N", min=1, help="Held-out samples; default: by --samples."),
    ] = None,
    two_object_fraction: Annotated[
        float,
        typer.Option("--two-object-fraction", metavar="F", min=0, max=1, help="Share of scenes with a relation."),
    ] = 0.25,
    only: Annotated[
        str | None, typer.Option("--only", metavar="KEY=NAME", help="Only color=NAME, maroon too, or only shape=NAME.")
    ] = None,
    overwrite: given.Overwrite = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Generate scenes of coloured shapes with captions and ground truth."""
    from ldm_cli.stages import data

    reporter = make_reporter()
    result = data.synth(
        out,
        samples,
        size,
        seed,
        reporter,
        val_samples=val_samples,
        two_object_fraction=two_object_fraction,
        only=only,
        overwrite=overwrite,
    )
    show_result(result, json)


@commands.command(epilog=epilog("data pack"))
def pack(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of pictures, or a CSV, JSON or Parquet file.")
    ],
    out: Output,
    image_column: Annotated[
        str | None, typer.Option("--image-column", metavar="NAME", help="Column of the pictures.")
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option("--caption-column", metavar="NAME", help="Column of the captions; '' for none.")
    ] = None,
    caption_template: Annotated[
        str, typer.Option("--caption-template", metavar="TEXT", help="Caption where only a class is known.")
    ] = "a photo of a {}",
    shard_samples: Annotated[
        int, typer.Option("--shard-samples", metavar="N", min=1, help="Samples per shard.")
    ] = 10_000,
    prefix: Annotated[str, typer.Option("--prefix", metavar="TEXT", help="Beginning of shard names.")] = "train-",
    val_fraction: Annotated[
        float, typer.Option("--val-fraction", metavar="F", min=0, max=0.99, help="Share held out, as shards val-….")
    ] = 0.0,
    overwrite: given.Overwrite = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Make shards of a folder of pictures with captions, of class folders, or of a table that names pictures."""
    from ldm_cli.data.sources import Choices
    from ldm_cli.stages import data

    if Path(prefix).name != prefix:
        raise UsageError(f"--prefix '{prefix}' is no beginning of a file name", remedy="give OUT the folder")
    result = data.pack(
        source,
        out,
        make_reporter(),
        choices=Choices(image_column, caption_column, caption_template),
        shard_samples=shard_samples,
        prefix=prefix,
        val_fraction=val_fraction,
        overwrite=overwrite,
    )
    show_result(result, json)


@commands.command(epilog=epilog("data check"))
def check(
    arguments: Shards,
    duplicates: Duplicates = None,
    against: Against = None,
    threshold: Threshold = 0.98,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Decode every sample and report all damage; exit code 65 if there is any."""
    config = _config(arguments)
    from ldm_cli.stages import data

    result = data.check(config, make_reporter()) | _duplicates(config, duplicates, against, threshold)
    show_result(result, json)
    if not result["ok"]:
        num_bad, num_damaged = sum(result["bad"].values()), len(result["damaged_shards"])
        cause = f"{num_bad} bad samples, {num_damaged} damaged shards"
        if hidden := result["hidden_samples"]:
            cause += f", {result['hidden']} samples hidden in others by a dot in their keys, such as {hidden[0]}"
        remedy = f"'{file}' names each" if (file := result.get("bad_samples_file")) else "the report names each"
        raise DataError("the data is not sound", cause, remedy)


@commands.command(epilog=epilog("data stats"))
def stats(
    arguments: Shards,
    duplicates: Duplicates = None,
    against: Against = None,
    threshold: Threshold = 0.98,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Count samples, formats, sizes, captions and labels."""
    config = _config(arguments)
    from ldm_cli.stages import data

    show_result(data.stats(config, make_reporter()) | _duplicates(config, duplicates, against, threshold), json)


@commands.command(epilog=epilog("data index"))
def index(
    context: typer.Context,
    arguments: Shards,
    sizes: Annotated[Path | None, given.option("--sizes", metavar="FILE", text="Also write a sizes.json.")] = None,
    hashed: Annotated[bool, typer.Option("--hash", help="Also hash every byte of the shards, for later runs.")] = False,
    nproc: given.NumProcesses = None,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Index shards ahead of a run."""
    config = _config(arguments)
    become_ranks(context.obj, nproc)
    from ldm_cli.stages import data

    result = data.index(config, make_rank_reporter(), sizes, hashed)
    if is_first_rank():
        show_result(result, json)


def _duplicates(config: DataConfig, file: Path | None, against: str | None, threshold: float) -> dict[str, Any]:
    """What `check` and `stats` add to their results with --duplicates."""
    from ldm_cli.stages import data

    if file is None:
        if against:
            raise UsageError("--against needs --duplicates", remedy="add --duplicates FILE")
        return {}
    return {"duplicates": data.duplicates(config, file, against, threshold, make_reporter())}


def _config(arguments: list[str]) -> DataConfig:
    """Data settings from patterns and `key=value` arguments."""
    from ldm_cli.data.config import DataConfig
    from ldm_cli.recipe.load import load_section

    changes = [argument for argument in arguments if given.is_setting(argument, DataConfig.model_fields)]
    patterns = [argument for argument in arguments if argument not in changes]
    if not patterns:
        raise UsageError("no shards given", remedy="name a path, a glob or a brace pattern")

    # As in recipes, whose fields messages name: `data.caption`.
    changes = [change.removeprefix("data.") for change in changes]
    return load_section(DataConfig, changes, [("SHARDS", "shards", patterns)])
