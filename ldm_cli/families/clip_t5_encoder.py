"""CLIP text towers and T5 beside them: two towers in Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206, section
4), one in eDiff-I (Balaji et al. 2022, arXiv:2211.01324)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, encoder_key, ignore, tokenizer_folder
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.families.t5_encoder import T5_LENGTH, T5TextEncoder, plain_texts, t5_key
from ldm_cli.formats.model_source import read_model_json
from ldm_cli.formats.pipeline_folder import (
    INDEX_NAME,
    MAX_SEQUENCE_LENGTH,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TEXT_ENCODER_3,
)


class CLIPT5Encoder:
    """An `Encoder` of one CLIP tower, or of two with projection, and of T5 or of nothing in its place.

    Its conditions hold `tokens` [B, L + M, D]: the states of the towers side by side, and after them T5's states, or
    zeros; the narrower ones are filled up with zeros. Of one tower they are the last states; of two, the penultimate
    ones, and `pooled` [B, P + P'] of both.

    Attributes:
        towers: each with its own tokenizer.
        t5: None: there is none.
        width: D, what the denoiser attends to.
        t5_length: M.

    Raises:
        CheckpointError: the towers take different numbers of tokens, or there is no room for those of T5.
    """

    def __init__(
        self, towers: Sequence[CLIPTextEncoder], t5: T5TextEncoder | None, width: int, t5_length: int = T5_LENGTH
    ) -> None:
        if towers[0].length != towers[-1].length:
            cause = f"the first takes {towers[0].length} tokens, the second {towers[-1].length}"
            raise CheckpointError("the text encoders do not fit together", cause)
        if t5 is not None and t5_length == 0:
            raise CheckpointError(
                "the text encoders do not fit together", f"{MAX_SEQUENCE_LENGTH}=0, but there is a T5"
            )
        self.towers, self.t5, self.width, self.t5_length = tuple(towers), t5, width, t5_length

    @classmethod
    def load(
        cls,
        folders: Mapping[str, Path],
        width: int,
        warn: Callable[[str], None] = ignore,
        dtype: torch.dtype = torch.float32,
        *,
        t5_length: int = T5_LENGTH,
        t5_dtype: torch.dtype | None = None,
        clip_skip: int | None = None,
        caption_chunks: int = 1,
    ) -> Self:
        """Read the text encoders and their tokenizers; errors as in `load_model`, and those of the class.

        Args:
            folders: by component: of a CLIP tower or of two with projection, or of whole CLIPs; and that of T5, if
                there is one.
            width: D.
            warn: called once for each tower if captions are cut.
            dtype: of the weights.
            t5_length: M.
            t5_dtype: of the weights of T5; None: `dtype`.
            clip_skip, caption_chunks: of the towers, as in `CLIPTextEncoder.load`.
        """
        is_pair = TEXT_ENCODER_2 in folders
        load = partial(
            CLIPTextEncoder.load,
            warn=warn,
            dtype=dtype,
            model_class=CLIPTextModelWithProjection if is_pair else CLIPTextModel,
            is_penultimate=is_pair,
            clip_skip=clip_skip,
            caption_chunks=caption_chunks,
        )
        towers = [load(folder) for name, folder in folders.items() if name != TEXT_ENCODER_3]
        t5 = T5TextEncoder.load(folders[TEXT_ENCODER_3], t5_dtype or dtype) if TEXT_ENCODER_3 in folders else None
        return cls(towers, t5, width, t5_length)

    def save(self, folder: Path) -> None:
        """Write encoders and tokenizers into a pipeline folder; errors as in `save_model`."""
        for name, text in self.texts.items():
            text.save(folder, name)

    @property
    def texts(self) -> dict[str, CLIPTextEncoder | T5TextEncoder]:
        """All encoders, by component of a pipeline."""
        towers = dict(zip((TEXT_ENCODER, TEXT_ENCODER_2), self.towers, strict=False))
        return {**towers, **({} if self.t5 is None else {TEXT_ENCODER_3: self.t5})}

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The networks of all encoders."""
        return tuple(text.model for text in self.texts.values())

    @property
    def key(self) -> dict[str, str]:
        """See `Encoder`."""
        t5 = {} if self.t5 is None else self.t5.key
        return _key([tower.key for tower in self.towers], t5, self.width, self.t5_length)

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Of B captions, on the host: `ids` and, of a second tower, `ids_2`, int64 [B, L]; with T5 `ids_3`, int64
        [B, M]."""
        ids = [tower.tokens(captions)["ids"] for tower in self.towers]
        found = dict(zip(_IDS, ids, strict=False))
        return found if self.t5 is None else {**found, "ids_3": self.t5.ids(captions, self.t5_length, ignore)}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Condition:
        """B rows from the `tokens` of captions, on any device."""
        pairs = zip(_IDS, self.towers, strict=False)
        conditions = [tower.encode_tokens({"ids": tokens[name]}) for name, tower in pairs]
        return self._joined(conditions, tokens.get("ids_3"))

    def without(self, condition: Condition, is_left_out: Tensor) -> Condition:
        """The condition with zeros in place of what some encoders gave, as if these encoders were not there.

        Args:
            condition: B rows of this encoder.
            is_left_out: bool [B, N], of each of the N encoders.
        """
        assert condition.tokens is not None
        kept = (~is_left_out).to(condition.tokens.dtype).chunk(is_left_out.shape[1], dim=1)
        widths = [tower.width for tower in self.towers]
        widths[-1] = self.width - sum(widths[:-1])
        length = condition.tokens.shape[1] - self.t5_length
        clip, t5 = condition.tokens[:, :length], condition.tokens[:, length:]
        clip = clip * _expanded(kept, widths)[:, None]
        t5 = t5 * kept[-1][:, None] if self.t5 else t5
        pooled = condition.pooled
        if pooled is not None:
            pooled = pooled * _expanded(kept, [tower.model.config.projection_dim for tower in self.towers])
        return Condition(tokens=torch.cat([clip, t5], dim=1), pooled=pooled)

    @property
    def index_settings(self) -> dict[str, int]:
        """What the index of a pipeline says about the encoder."""
        length = {} if self.t5_length == T5_LENGTH else {MAX_SEQUENCE_LENGTH: self.t5_length}
        return self.towers[0].index_settings | length

    def check(self, reading: PromptReading) -> None:
        """See `Encoder`."""
        for tower in self.towers:
            tower.check(reading)

    def num_chunks(self, prompt: str, reading: PromptReading) -> int:
        """See `Encoder`."""
        return max(tower.num_chunks(prompt, reading) for tower in self.towers)

    @torch.inference_mode()
    def encode_prompts(
        self, prompts: Sequence[str], reading: PromptReading, *, num_chunks: int, warn: Callable[[str], None]
    ) -> Condition:
        """B prompts in one batch; weights of words, chunks and `clip_skip` are of the towers of CLIP. See `Encoder`."""
        conditions = [t.encode_prompts(prompts, reading, num_chunks=num_chunks, warn=warn) for t in self.towers]
        if self.t5 is None:
            return self._joined(conditions, None)
        return self._joined(conditions, self.t5.ids(plain_texts(prompts, reading), self.t5_length, warn))

    def _joined(self, conditions: Sequence[Condition], ids_3: Tensor | None) -> Condition:
        """The conditions of the towers and the token ids of T5, as one."""
        clip = torch.cat([c.tokens for c in conditions if c.tokens is not None], dim=-1)
        pooled = [c.pooled for c in conditions if c.pooled is not None]
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        if self.t5 is None or ids_3 is None:
            states = clip.new_zeros(len(clip), self.t5_length, self.width)
        else:
            states = F.pad(self.t5.encode(ids_3).to(clip.dtype), (0, self.width - self.t5.width))
        return Condition(torch.cat([clip, states], dim=1), torch.cat(pooled, dim=-1) if pooled else None)


_IDS = ("ids", "ids_2")
"""Names of the tokens of the towers."""


def _expanded(kept: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """[B, Σ widths] of columns [B, 1], each as often as its width says."""
    return torch.cat([column.expand(-1, width) for column, width in zip(kept, widths, strict=False)], dim=1)


def has_t5(pipeline: Path) -> bool:
    """Whether a pipeline folder has a T5 beside its CLIPs."""
    return read_model_json(pipeline / INDEX_NAME).get(TEXT_ENCODER_3) not in (None, [None, None])


def clip_t5_key(folders: Mapping[str, Path], width: int, t5_length: int) -> dict[str, str]:
    """`CLIPT5Encoder.key` of the folders of encoders, which are not read; arguments as in `CLIPT5Encoder.load`."""
    towers = [folder for name, folder in folders.items() if name != TEXT_ENCODER_3]
    keys = [encoder_key(folder, Tokenizer.load(tokenizer_folder(folder))) for folder in towers]
    return _key(keys, t5_key(folders[TEXT_ENCODER_3]) if TEXT_ENCODER_3 in folders else {}, width, t5_length)


def _key(towers: Sequence[Mapping[str, str]], t5: Mapping[str, str], width: int, t5_length: int) -> dict[str, str]:
    sizes = {"width": str(width), MAX_SEQUENCE_LENGTH: str(t5_length)}
    second = {f"{name}_2": value for tower in towers[1:] for name, value in tower.items()}
    return {**towers[0], **second, **t5, **sizes}
