"""Class labels, alone or beside text: prompts to conditions of a denoiser with a table of classes.

The last row of the table is no class, as the empty prompt is no text: classifier-free guidance needs it (Ho & Salimans
2022, arXiv:2207.12598).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.errors import CheckpointError, DataError, UsageError
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.families.t5_encoder import T5Encoder

ID2LABEL = "id2label"
"""Setting of the index of a pipeline: class indexes and names, as in that of diffusers' DiTPipeline."""
_LABELLED = re.compile(r"\s*<([^<>]*)>\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class LabelEncoder:
    """An `Encoder`; its conditions hold class indexes as `pooled`, int64 [B], and `tokens` [B, L, D] if there is text.

    Without text a prompt is a class: its name or its number. With text it is `<CLASS> text`. The empty prompt is no
    class, and so is a text without brackets.

    Attributes:
        names: of the K classes, in the order of their indexes; index K is no class.
        text: the text encoder; None: there is no text.
    """

    names: tuple[str, ...]
    text: CLIPTextEncoder | T5Encoder | None
    device: torch.device | str

    @property
    def models(self) -> tuple[Any, ...]:
        """The text encoder's network, if there is one."""
        return () if self.text is None else self.text.models

    @property
    def key(self) -> dict[str, str]:
        """See `Encoder`."""
        return {"classes": ", ".join(self.names), **({} if self.text is None else self.text.key)}

    @property
    def index_settings(self) -> dict[str, Any]:
        """What the index of a pipeline says about the encoder."""
        names = {ID2LABEL: {str(index): name for index, name in enumerate(self.names)}}
        return names if self.text is None else names | self.text.index_settings

    def save(self, folder: Path) -> None:
        """Write the text encoder, if there is one; errors as in its `save`."""
        if self.text is not None:
            self.text.save(folder)

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Of B captions without a class, on the host: those of the text encoder, and `labels`, int64 [B]."""
        text = {} if self.text is None else self.text.tokens(captions)
        return {**text, "labels": torch.full((len(captions),), len(self.names))}

    def labelled(self, tokens: Mapping[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        """The `tokens` of captions with the classes of their pictures, int64 [B], on the host.

        Raises:
            DataError: a class is missing, or has no name.
        """
        if labels is None:
            raise DataError("samples have no class labels", "data.label names none")
        outside = labels[(labels < 0) | (labels >= len(self.names))]
        if len(outside):
            cause = f"there are names for {len(self.names)} classes, from 0"
            raise DataError(f"class label {int(outside[0])} is unknown", cause, "correct classes or data.label")
        return {**tokens, "labels": labels}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Condition:
        """B rows from the `tokens` of captions, on any device."""
        condition = Condition() if self.text is None else self.text.encode_tokens(tokens)
        return replace(condition, pooled=tokens["labels"].to(self.device, non_blocking=True))

    def check(self, reading: PromptReading) -> None:
        """See `Encoder`."""
        if self.text is not None:
            self.text.check(reading)

    def num_chunks(self, prompt: str, reading: PromptReading) -> int:
        """See `Encoder`.

        Raises:
            UsageError: the prompt names a class that does not exist.
        """
        _, text = self._parts(prompt)
        return 1 if self.text is None else self.text.num_chunks(text, reading)

    @torch.inference_mode()
    def encode_prompts(
        self, prompts: Sequence[str], reading: PromptReading, *, num_chunks: int, warn: Callable[[str], None]
    ) -> Condition:
        """B prompts in one batch; see `Encoder`.

        Raises:
            UsageError: a prompt names a class that does not exist.
        """
        labels, texts = zip(*map(self._parts, prompts), strict=True)
        condition = Condition()
        if self.text is not None:
            condition = self.text.encode_prompts(texts, reading, num_chunks=num_chunks, warn=warn)
        return replace(condition, pooled=torch.tensor(labels).to(self.device, non_blocking=True))

    def _parts(self, prompt: str) -> tuple[int, str]:
        """The class index and the text of a prompt."""
        if self.text is None:
            return self._index(prompt.strip()), ""
        found = _LABELLED.fullmatch(prompt)
        return (len(self.names), prompt) if found is None else (self._index(found[1].strip()), found[2])

    def _index(self, name: str) -> int:
        if name in self.names:
            return self.names.index(name)
        if name.isdecimal() and int(name) < len(self.names):
            return int(name)
        if not name:
            return len(self.names)
        shown = ", ".join(self.names[:20]) + (", …" if len(self.names) > 20 else "")
        raise UsageError(f"the model has no class {name!r}", f"its classes are {shown}", "give one of them")


def class_names(index: Mapping[str, Any], num_class_embeds: int, file: Path) -> tuple[str, ...]:
    """The names of the classes of a pipeline; their numbers where its index has no names.

    Args:
        index: of the pipeline.
        num_class_embeds: rows of the table, the last one for no class.

    Raises:
        CheckpointError: the index names other classes than there are.
    """
    count = num_class_embeds - 1
    numbers = [str(number) for number in range(count)]
    found = index.get(ID2LABEL, dict(zip(numbers, numbers, strict=True)))
    if not isinstance(found, dict) or found.keys() != set(numbers):
        raise CheckpointError(f"cannot use '{file}'", f"{ID2LABEL} does not name the {count} classes of unet")
    return tuple(str(found[number]) for number in numbers)
