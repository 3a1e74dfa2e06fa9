"""Where files of adapters lie, what they are called, and their hashes; imports no torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ldm_cli.errors import InputNotFoundError
from ldm_cli.inputs import open_input

DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
"""Name under which diffusers looks for adapters in a folder."""
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a folder of PEFT."""
_NO_ADAPTERS = re.compile("scheduler|optimizer|checkpoint")


def lora_file(path: Path) -> Path:
    """The file of adapters that a path means: itself, or that of a folder or of a run.

    Raises:
        InputNotFoundError: there is none, or more than one.
    """
    if path.is_file():
        return path
    for folder in (path, path / "model"):
        for name in (DIFFUSERS_LORA, PEFT_WEIGHTS):
            if (folder / name).is_file():
                return folder / name
    found = [file for file in sorted(path.glob("*.safetensors")) if not _NO_ADAPTERS.search(file.name)]
    if len(found) == 1:
        return found[0]
    cause = f"it holds {', '.join(file.name for file in found[:5])}" if found else "no such file, nor a folder with one"
    raise InputNotFoundError(f"no adapters in '{path}'", cause, "give a .safetensors file")


def lora_name(path: Path) -> str:
    """What a file of adapters is called: its name without the ending, or that of its folder or run."""
    path = path.absolute()
    if path.suffix == ".safetensors" and path.name not in (DIFFUSERS_LORA, PEFT_WEIGHTS):
        return path.stem
    folder = path.parent if path.suffix == ".safetensors" else path
    return folder.parent.name if folder.name == "model" else folder.name


def lora_sha256(path: Path) -> str:
    """Hex sha256 of a file of adapters; of PEFT's, of the file followed by its configuration.

    Raises:
        InputNotFoundError: as in `lora_file`.
    """
    file = lora_file(path)
    digest = hashlib.sha256()
    for part in (file, file.with_name(PEFT_CONFIG)):
        if part is file or file.name == PEFT_WEIGHTS:
            with open_input(part) as stream:
                while block := stream.read(2**20):
                    digest.update(block)
    return digest.hexdigest()
