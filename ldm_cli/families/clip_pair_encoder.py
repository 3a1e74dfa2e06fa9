"""Two CLIP text towers side by side, as in Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, encoder_key, ignore, index_setting, tokenizer_folder
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_2, ZEROES_EMPTY


class CLIPPairEncoder:
    """An `Encoder` of two towers, the second with a projection.

    Its conditions hold `tokens` [B, L, D + D'], the penultimate states of both, and `pooled` [B, P] of the second.

    Attributes:
        first, second: the towers, each with its own tokenizer.
        zeroes_empty: whether the condition of the empty prompt is zeros, instead of what the towers make of it.

    Raises:
        CheckpointError: the towers take different numbers of tokens.
    """

    def __init__(self, first: CLIPTextEncoder, second: CLIPTextEncoder, *, zeroes_empty: bool = True) -> None:
        if first.length != second.length:
            cause = f"the first takes {first.length} tokens, the second {second.length}"
            raise CheckpointError("the text encoders do not fit together", cause)
        self.first, self.second, self.zeroes_empty = first, second, zeroes_empty

    @classmethod
    def load(
        cls,
        first: Path,
        second: Path,
        warn: Callable[[str], None] = ignore,
        dtype: torch.dtype = torch.float32,
        *,
        clip_skip: int | None = None,
        caption_chunks: int = 1,
    ) -> Self:
        """Read both towers and their tokenizers; errors as in `load_model`, and those of the class.

        Args:
            first: folder of a CLIPTextModel or a CLIPModel.
            second: folder of a CLIPTextModelWithProjection or a CLIPModel.
            warn: called once for each tower if captions are cut.
            dtype: of the towers' weights.
            clip_skip, caption_chunks: of both towers, as in `CLIPTextEncoder.load`.
        """
        load = partial(
            CLIPTextEncoder.load,
            warn=warn,
            dtype=dtype,
            is_penultimate=True,
            clip_skip=clip_skip,
            caption_chunks=caption_chunks,
        )
        towers = load(first), load(second, model_class=CLIPTextModelWithProjection)
        return cls(*towers, zeroes_empty=zeroes_empty(first))

    def save(self, folder: Path) -> None:
        """Write both towers and tokenizers into a pipeline folder; errors as in `save_model`."""
        self.first.save(folder, TEXT_ENCODER)
        self.second.save(folder, TEXT_ENCODER_2)

    @property
    def models(self) -> tuple[CLIPTextModel, ...]:
        """Both towers."""
        return self.first.model, self.second.model

    @property
    def width(self) -> int:
        """D + D'."""
        return self.first.width + self.second.width

    @property
    def key(self) -> dict[str, str]:
        """See `Encoder`."""
        return _pair_key(self.first.key, self.second.key, self.zeroes_empty)

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Of B captions, on the host: `ids` and `ids_2`, int64 [B, n·L]; `is_empty`, bool [B]."""
        second = self.second.tokens(captions)["ids"]
        return {**self.first.tokens(captions), "ids_2": second, "is_empty": _are_empty(captions)}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Condition:
        """B rows from the `tokens` of captions, on any device."""
        towers = {"ids": self.first, "ids_2": self.second}
        conditions = [tower.encode_tokens({"ids": tokens[name]}) for name, tower in towers.items()]
        return self._joined(conditions, tokens["is_empty"])

    def check(self, reading: PromptReading) -> None:
        """See `Encoder`."""
        self.first.check(reading)
        self.second.check(reading)

    def num_chunks(self, prompt: str, reading: PromptReading) -> int:
        """See `Encoder`."""
        return max(self.first.num_chunks(prompt, reading), self.second.num_chunks(prompt, reading))

    def encode_prompts(
        self, prompts: Sequence[str], reading: PromptReading, *, num_chunks: int, warn: Callable[[str], None]
    ) -> Condition:
        """B prompts in one batch; see `Encoder`. `pooled` is that of the first chunk."""
        towers = self.first, self.second
        conditions = [tower.encode_prompts(prompts, reading, num_chunks=num_chunks, warn=warn) for tower in towers]
        return self._joined(conditions, _are_empty(prompts))

    def _joined(self, conditions: Sequence[Condition], is_empty: Tensor) -> Condition:
        """The conditions that the towers give for some captions, as one; `is_empty` says which captions are empty."""
        tokens = torch.cat([c.tokens for c in conditions if c.tokens is not None], dim=-1)
        joined = Condition(tokens=tokens, pooled=conditions[-1].pooled)
        if not self.zeroes_empty:
            return joined
        return joined.replaced(is_empty.to(tokens.device, non_blocking=True), joined.map(torch.zeros_like))


def _are_empty(captions: Iterable[str]) -> Tensor:
    """bool [B]."""
    return torch.tensor([not caption for caption in captions])


def zeroes_empty(text_encoder: Path) -> bool:
    """Whether the pipeline in which the first text encoder lies zeroes the empty prompt; True without a pipeline."""
    return bool(index_setting(text_encoder, ZEROES_EMPTY, True))


def pair_key(first: Path, second: Path) -> dict[str, str]:
    """`CLIPPairEncoder.key` of the folders of two towers, which are not read."""
    one, other = (encoder_key(folder, Tokenizer.load(tokenizer_folder(folder))) for folder in (first, second))
    return _pair_key(one, other, zeroes_empty(first))


def _pair_key(first: Mapping[str, str], second: Mapping[str, str], zeroes: bool) -> dict[str, str]:
    return {**first, **{f"{name}_2": value for name, value in second.items()}, ZEROES_EMPTY: str(zeroes)}
