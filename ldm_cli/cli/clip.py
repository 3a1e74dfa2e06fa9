"""`ldm clip embed | search | classify | tag | ask | score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_result
from ldm_cli.cli.startup import importing

if TYPE_CHECKING:
    from ldm_cli.stages.support.clip_inputs import ClipOptions

commands = typer.Typer(help="Put a CLIP to work: search, classify, tag, ask.")
Pictures = Annotated[list[str], given.argument("PICTURES", "Pictures, folders, or shards by path, glob or brace.")]
Model = Annotated[str, given.option("--model", metavar="MODEL", text="A CLIP: folder, run, single file or hub name.")]
Top = Annotated[int, typer.Option("--top", min=1, metavar="K", help="Results to show for each.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Pictures per call of the model.")]


@commands.command()
def embed(
    model: Model,
    out: Annotated[Path, given.option("--out", metavar="FILE", text="A .npy or .safetensors file.")],
    pictures: Annotated[
        list[str] | None, given.argument("PICTURES", "Pictures, folders, or shards by path, glob or brace.")
    ] = None,
    texts: Annotated[
        str | None, given.option("--texts", metavar="FILE|A,B", text="Embed texts: lines of a file, or between commas.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Write float16: half the size.")] = False,
    batch_size: BatchSize = 64,
    device: given.Device = "auto",
    overwrite: given.Overwrite = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Write the embeddings of pictures or texts."""
    options = _options(model, device, batch_size)
    with importing():
        from ldm_cli.stages import clip_embed

    result = clip_embed.run(pictures or [], texts, out, options, make_reporter(), half=half, overwrite=overwrite)
    if not json:
        result.pop("provenance")
    show_result(result, json)


@commands.command()
def search(
    where: Annotated[list[str], given.argument("WHERE", "Pictures, folders, shards, or a file of `ldm clip embed`.")],
    model: Annotated[
        str, given.option("--model", metavar="MODEL", text="A CLIP; default: the one that made the embeddings.")
    ] = "",
    text: Annotated[
        list[str] | None, given.option("--text", metavar="TEXT", text="Search for a text; may be repeated.")
    ] = None,
    like: Annotated[
        list[Path] | None, given.option("--like", metavar="FILE", text="Search for a picture; may be repeated.")
    ] = None,
    top: Top = 10,
    sheet: Annotated[Path | None, given.option("--sheet", metavar="FILE", text="Draw the results, as .png.")] = None,
    batch_size: BatchSize = 64,
    device: given.Device = "auto",
    overwrite: given.Overwrite = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Find the pictures nearest to a text or to a picture."""
    options = _options(model, device, batch_size)
    with importing():
        from ldm_cli.stages import clip_search

    wanted = clip_search.Wanted(text or (), like or (), top, sheet, overwrite)
    result = clip_search.run(where, wanted, options, make_reporter())
    if not json:
        result.pop("provenance")
        result |= {str(query.get("text") or query["picture"]): query["results"] for query in result.pop("queries")}
    show_result(result, json)


def _options(model: str, device: str, batch_size: int) -> ClipOptions:
    with importing():
        from ldm_cli.stages.support.clip_inputs import ClipOptions  # imports torch

    return ClipOptions(model, device, batch_size)
