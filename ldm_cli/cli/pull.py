"""`ldm pull`."""

from __future__ import annotations

from typing import Annotated

from ldm_cli.cli import options as given
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_result
from ldm_cli.cli.startup import importing
from ldm_cli.cli.streams import write_result
from ldm_cli.errors import UsageError


def command(
    name: Annotated[str, given.argument("ORG/NAME[@REVISION]", "A model of the hub; a branch, tag or commit of it.")],
    variant: given.Variant = None,
    components: Annotated[
        list[str] | None, given.option("--component", metavar="NAME", text="Only this subfolder; may be repeated.")
    ] = None,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Download a model of the Hugging Face hub ahead of its use, and print its folder."""
    with importing():
        from ldm_cli.formats.hub import HubName, fetch, recorded

    if (model := HubName.parse(name)) is None:
        raise UsageError(f"'{name}' is no name of a model", remedy="write ORG/NAME or ORG/NAME@REVISION")
    if variant not in (None, "fp16", "bf16"):
        raise UsageError(f"unknown --variant '{variant}'", remedy="it takes fp16, bf16")
    folder = fetch(model, components or (), variant, make_reporter())
    if json:
        show_result({"model": recorded(folder), "folder": str(folder)}, as_json=True)
    else:
        write_result(f"{folder}\n")
