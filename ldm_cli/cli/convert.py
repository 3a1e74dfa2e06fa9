"""`ldm convert`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_result
from ldm_cli.cli.startup import importing
from ldm_cli.errors import UsageError

Prior = Annotated[
    Path | None,
    given.option("--prior", metavar="DIR", text="unCLIP: prior of train-prior that IN, a decoder, is joined to."),
]
LPIPSHeads = Annotated[
    Path | None, given.option("--lpips-heads", metavar="FILE", text="Heads of LPIPS, for IN of torchvision.")
]
_DTYPES = ("fp32", "fp16", "bf16")
_PREDICTIONS = ("epsilon", "v_prediction")
_VARIANTS = ("fp16", "bf16")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def command(
    source: Annotated[Path, given.argument("IN", "A folder, a run, a single file, or ORG/NAME on the hub.")],
    out: Annotated[Path, given.argument("OUT", "A folder, or FILE.safetensors.")],
    dtype: Annotated[
        str | None, given.option("--dtype", metavar="fp32|fp16|bf16", text="Type of the numbers; as they are.")
    ] = None,
    shard_size: Annotated[
        str | None, given.option("--shard-size", metavar="SIZE", text="Most bytes in a file of a folder: 2GB.")
    ] = None,
    tokenizer: Annotated[
        Path | None, given.option("--tokenizer", metavar="DIR", text="Tokenizer of a single file; the one beside it.")
    ] = None,
    config: Annotated[
        Path | None,
        given.option("--config", metavar="DIR", text="Model folder with the configurations of a single file."),
    ] = None,
    prediction: Annotated[
        str | None,
        given.option("--prediction-type", metavar="epsilon|v_prediction", text="What the U-Net predicts."),
    ] = None,
    merge_lora: Annotated[
        list[str] | None,
        given.option("--merge-lora", metavar="FILE[=W]", text="Put adapters into the weights; may be repeated."),
    ] = None,
    prior: Prior = None,
    lpips_heads: LPIPSHeads = None,
    variant: given.Variant = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights of a single file.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .ckpt and .bin, of which only tensors are taken.")
    ] = False,
    overwrite: given.Overwrite = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Convert a model between folders and single files, to another type of numbers, or into shards."""
    choices = ("--dtype", dtype, _DTYPES), ("--prediction-type", prediction, _PREDICTIONS)
    for name, value, allowed in (*choices, ("--variant", variant, _VARIANTS)):
        if value not in (None, *allowed):
            raise UsageError(f"unknown {name} '{value}'", remedy="it takes " + ", ".join(allowed))
    shard_bytes = None if shard_size is None else _num_bytes(shard_size)
    with importing():
        from ldm_cli.stages import convert

    loras = tuple((Path(path), weight) for path, weight in map(given.weighted_path, merge_lora or ()))
    options = convert.ConvertOptions(
        dtype,
        shard_bytes,
        config,
        tokenizer,
        prediction,
        ema,
        allow_pickle,
        overwrite,
        lpips_heads,
        variant,
        loras,
        prior,
    )
    show_result(convert.run(source, out, options, make_reporter()), json)


def _num_bytes(text: str) -> int:
    """Bytes of `2GB`, `500MB` or a plain number.

    >>> _num_bytes("2GB"), _num_bytes("1.5M")
    (2000000000, 1500000)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?)B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size <= 0:
        raise UsageError(f"--shard-size '{text}' is no size", remedy="write 2GB, 500MB or a number of bytes")
    return size
