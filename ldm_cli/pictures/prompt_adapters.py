"""Adapters of a job: files that the recipe gives, and `<lora:name:weight>` in prompts, as AUTOMATIC1111 writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ldm_cli.config import Config
from ldm_cli.errors import InputNotFoundError, UsageError
from ldm_cli.formats.lora_path import lora_name
from ldm_cli.pictures.job import Item, Job, errors_at

_TAG = re.compile(r"\s*<(?:lora|lyco):([^<>]*)>", re.IGNORECASE)
_OPEN_TAG = re.compile(r"<(?:lora|lyco):", re.IGNORECASE)
_REMEDY = "write <lora:NAME:0.8>"


class LoraEntry(Config):
    """A file of adapters."""

    path: str
    """The file, or a folder of diffusers or PEFT, or a run."""
    weight: float = 1.0
    """How much of it every picture has; 0: only those whose prompts name it."""


class EmbeddingEntry(Config):
    """A file of textual inversion."""

    path: str
    """The file."""
    word: str | None = None
    """What prompts call it; null: as the file says, else its name."""


class ImagePromptEntry(Config):
    """A picture that prompts beside the text, through an image prompt adapter (IP-Adapter)."""

    image: str
    """The picture."""
    scale: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """How much the attention to it counts, where that to the text counts 1; pictures add up."""
    adapter: str
    """The adapter: its file, or a run of `train-unet` with `image_prompt`."""
    image_encoder: str | None = None
    """Folder of the image encoder that the adapter was trained with; null: `image_encoder` beside its file."""


class LoraFiles:
    """The files of adapters that a job may use, by name.

    Attributes:
        paths: by name, which is that of the file without its ending, or of the folder.
    """

    def __init__(self, entries: Sequence[LoraEntry], folder: Path | None) -> None:
        """Name the files.

        Args:
            entries: files with weights for all pictures.
            folder: of further files, which prompts may name.

        Raises:
            UsageError: two files have the same name.
            InputNotFoundError: there is no such folder.
        """
        self.paths: dict[str, Path] = {}
        self._shared: dict[str, float] = {}
        self._ambiguous: dict[str, Path] = {}
        for entry in entries:
            name = lora_name(Path(entry.path))
            if name in self.paths:
                raise UsageError(f"two adapters are named '{name}'", remedy="rename one of the files")
            self.paths[name], self._shared[name] = Path(entry.path), entry.weight
        if folder is not None:
            if not folder.is_dir():
                raise InputNotFoundError(f"adapters '{folder}' not found", "no such folder", "check --lora-dir")
            for file in sorted(folder.rglob("*.safetensors")):
                name = lora_name(file)
                if self.paths.setdefault(name, file) is not file and name not in self._shared:
                    self._ambiguous[name] = file

    def read_tags(self, job: Job) -> Job:
        """The job with the tags of its prompts taken out and put into `Item.loras`.

        Raises:
            UsageError: a tag names no file, or is not understood.
        """
        return replace(job, items=tuple(self._without_tags(item) for item in job.items))

    def _without_tags(self, item: Item) -> Item:
        blend = item.request.blend
        with errors_at(item.place):
            prompt, weights = self._split(item.request.prompt)
            other, ends = self._split("" if blend is None else blend.prompt)
        request = replace(item.request, prompt=prompt)
        if blend is not None:
            # On the way between two prompts, weights lie on the line between both, as the text does.
            starts = {name: weights.get(name, 0.0) for name in {**weights, **ends}}
            weights = {name: start + blend.weight * (ends.get(name, 0.0) - start) for name, start in starts.items()}
            request = replace(request, blend=blend.model_copy(update={"prompt": other}))
        return replace(item, request=request, loras=tuple(sorted((n, w) for n, w in weights.items() if w != 0.0)))

    def _split(self, prompt: str) -> tuple[str, dict[str, float]]:
        """A prompt without its tags, and the weight of each adapter: those of one name are added up."""
        weights = dict(self._shared)
        for found in _TAG.finditer(prompt):
            name, weight = self._parsed(found[0].strip(), found[1])
            weights[name] = weights.get(name, 0.0) + weight
        rest = _TAG.sub("", prompt).strip() if _TAG.search(prompt) else prompt
        if unclosed := _OPEN_TAG.search(rest):
            raise UsageError(f"'{rest[unclosed.start() :][:40]}' is not understood", "the tag has no end", _REMEDY)
        return rest, weights

    def _parsed(self, tag: str, content: str) -> tuple[str, float]:
        name, *rest = (part.strip() for part in content.split(":"))
        try:
            (weight,) = map(float, rest or ["1"])
            if not math.isfinite(weight):
                raise ValueError(weight)
        except ValueError:
            raise UsageError(f"'{tag}' is not understood", "one number is read", _REMEDY) from None
        if name not in self.paths:
            near = ", ".join(get_close_matches(name, self.paths)) or ", ".join(sorted(self.paths)[:5])
            cause = f"there is {near}" if near else "no file of adapters is given"
            raise UsageError(f"no adapters are named '{name}'", cause, "add --lora FILE=0 or --lora-dir DIR")
        if name in self._ambiguous:
            cause = f"{self.paths[name]} and {self._ambiguous[name]}"
            raise UsageError(f"two adapters are named '{name}'", cause, "give one of them as --lora FILE=0")
        return name, weight
