"""`ldm clip embed | search | classify | tag | ask | score | dedup`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.examples import epilog
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_result
from ldm_cli.cli.startup import importing

if TYPE_CHECKING:
    from ldm_cli.stages.support.clip_inputs import ClipOptions

commands = typer.Typer(help="Put a CLIP to work: search, classify, tag, ask.")
Pictures = Annotated[list[str], given.argument("PICTURES", "Pictures, folders, or shards by path, glob or brace.")]
Model = Annotated[str, given.option("--model", metavar="MODEL", text="A CLIP: folder, run, single file or hub name.")]
Top = Annotated[int, typer.Option("--top", min=1, metavar="K", help="Results to show for each.")]
Sheet = Annotated[Path | None, given.option("--sheet", metavar="FILE", text="Draw the results, as .png.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Pictures per call of the model.")]


@commands.command(epilog=epilog("clip embed"))
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


@commands.command(epilog=epilog("clip search"))
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
    sheet: Sheet = None,
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


@commands.command(epilog=epilog("clip classify"))
def classify(
    pictures: Pictures,
    model: Model,
    labels: Annotated[
        str, given.option("--labels", metavar="A,B|FILE", text="Between commas, or a line of a file each.")
    ],
    templates: Annotated[
        str, typer.Option("--templates", metavar="imagenet|TEXT|FILE", help="Prompts, with {} for the label.")
    ] = "imagenet",
    top: Top = 5,
    batch_size: BatchSize = 64,
    device: given.Device = "auto",
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Tell which of some labels fits each picture."""
    options = _options(model, device, batch_size)
    with importing():
        from ldm_cli.stages import clip_answers

    _show(clip_answers.classify(pictures, labels, templates, top, options, make_reporter()), json)


@commands.command(epilog=epilog("clip tag"))
def tag(
    pictures: Pictures,
    model: Model,
    captions: Annotated[
        str | None,
        given.option("--captions", metavar="A,B|FILE|SHARDS", text="Captions; default: those of the pictures."),
    ] = None,
    top: Top = 3,
    batch_size: BatchSize = 64,
    device: given.Device = "auto",
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Find the captions nearest to each picture."""
    options = _options(model, device, batch_size)
    with importing():
        from ldm_cli.stages import clip_answers

    _show(clip_answers.tag(pictures, captions, top, options, make_reporter()), json)


@commands.command(epilog=epilog("clip ask"))
def ask(
    pictures: Annotated[str, given.argument("PICTURES", "A picture, a folder, or shards.")],
    question: Annotated[str, given.argument("QUESTION", "In English: what colour is the circle?")],
    model: Model,
    answers: Annotated[str, given.option("--answers", metavar="A,B|FILE", text="The answers to choose from.")],
    batch_size: BatchSize = 64,
    device: given.Device = "auto",
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Answer a question about each picture with one of some answers."""
    options = _options(model, device, batch_size)
    with importing():
        from ldm_cli.stages import clip_answers

    _show(clip_answers.ask(pictures, question, answers, options, make_reporter()), json)


@commands.command(epilog=epilog("clip score"))
def score(
    pictures: Pictures,
    model: Model,
    caption: Annotated[
        str | None, given.option("--caption", metavar="TEXT", text="One caption for all; default: their own.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, metavar="K", help="Lowest scores to show.")] = 10,
    sheet: Sheet = None,
    batch_size: BatchSize = 64,
    device: given.Device = "auto",
    overwrite: given.Overwrite = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Measure how well captions fit their pictures: CLIP score."""
    options = _options(model, device, batch_size)
    with importing():
        from ldm_cli.stages import clip_answers

    result = clip_answers.score(pictures, caption, options, make_reporter(), top=top, sheet=sheet, overwrite=overwrite)
    if not json:
        result.pop("provenance")
        result["lowest"] = sorted(result.pop("pictures"), key=lambda pair: float(pair["cosine"]))[:top]
    show_result(result, json)


@commands.command(epilog=epilog("clip dedup"))
def dedup(
    embeddings: Annotated[Path, given.argument("EMBEDDINGS", "A file of `ldm clip embed`.")],
    out: Annotated[Path, given.option("--out", metavar="FILE", text="List of samples to leave out.")],
    against: Annotated[
        Path | None,
        given.option("--against", metavar="EMBEDDINGS", text="Also find pictures that are in this set, as validation."),
    ] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", metavar="F", min=0, max=1, help="Cosine from which two are duplicates.")
    ] = 0.95,
    overwrite: given.Overwrite = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Find near-duplicates, and write those to leave out as a file for data.quarantine."""
    with importing():
        from ldm_cli.stages import clip_dedup

    result = clip_dedup.run(embeddings, against, threshold, out, make_reporter(), overwrite=overwrite)
    if not json:
        result.pop("clip")
    show_result(result, json)


def _show(result: dict[str, Any], json: bool) -> None:
    """The result; for people, a row for each picture and candidate, and no provenance."""
    if not json:
        result.pop("provenance")
        pictures = result.pop("pictures")
        result["pictures"] = [
            {"name": picture["name"] if rank == 0 else "", **entry}
            for picture in pictures
            for rank, entry in enumerate(picture["results"])
        ]
    show_result(result, json)


def _options(model: str, device: str, batch_size: int) -> ClipOptions:
    with importing():
        from ldm_cli.stages.support.clip_inputs import ClipOptions  # imports torch

    return ClipOptions(model, device, batch_size)
