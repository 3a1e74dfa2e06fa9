"""Two CLIP text towers and T5, as in Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.clip import CLIPTextModelWithProjection
from ldm_cli.core.models.t5_encoder import T5EncoderModel
from ldm_cli.data.unigram_tokenizer import UnigramTokenizer
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, ignore, tokenizer_folder
from ldm_cli.families.family import model_sha256
from ldm_cli.families.prompt_chunks import BREAK, PromptReading, pieces_of
from ldm_cli.formats.model_folder import load_model
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3, tokenizer_of
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS

T5_LENGTH = 256
"""Tokens of T5, padding included: diffusers' default."""


class T5TextEncoder:
    """T5's encoder and its tokenizer.

    Attributes:
        model: the encoder.
        tokenizer: its tokenizer.
        folder: where the encoder was read, for `key`; None if it was not.
    """

    def __init__(self, model: T5EncoderModel, tokenizer: UnigramTokenizer, folder: Path | None = None) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> Self:
        """Read an encoder, and its tokenizer from `tokenizer_3` beside it or from the same folder.

        Args:
            folder: of a T5EncoderModel.
            dtype: of the weights. float16 becomes bfloat16, whose range the feed-forward layers need.

        Raises:
            InputNotFoundError, CheckpointError: as in `load_model`.
        """
        dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        tokenizer = UnigramTokenizer.load(tokenizer_folder(folder))
        return cls(load_model(T5EncoderModel, folder, dtype=dtype), tokenizer, folder)

    def save(self, folder: Path) -> None:
        """Write encoder and tokenizer into a pipeline folder; errors as in `save_model`."""
        weights, config = self.model.state_dict(), self.model.config.to_hugging_face()
        save_model(folder / TEXT_ENCODER_3, weights, config, TRANSFORMERS_WEIGHTS)
        self.tokenizer.save(folder / tokenizer_of(TEXT_ENCODER_3), T5_LENGTH)

    @property
    def key(self) -> dict[str, str]:
        """Hashes of the encoder and of the tokenizer; of an encoder that was read from a folder."""
        assert self.folder is not None
        return {"text_encoder_3": model_sha256(self.folder), "tokenizer_3": self.tokenizer.fingerprint}

    def encode(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, L], on any device → states [B, L, D]."""
        states: Tensor = self.model(ids.to(next(self.model.parameters()).device, non_blocking=True))
        return states


class CLIPT5Encoder:
    """An `Encoder` of two CLIP towers with projection, and of T5 or of nothing in its place.

    Its conditions hold `tokens` [B, L + 256, D]: the penultimate states of the towers side by side, filled up with
    zeros, and after them T5's states, or zeros; and `pooled` [B, P + P'] of both towers.

    Attributes:
        first, second: the towers, each with its own tokenizer.
        third: T5; None: there is none.
        width: D, the denoiser's `joint_attention_dim`.
    """

    def __init__(
        self, first: CLIPTextEncoder, second: CLIPTextEncoder, third: T5TextEncoder | None, width: int
    ) -> None:
        self.first, self.second, self.third, self.width = first, second, third, width

    @classmethod
    def load(
        cls,
        folder: Path,
        width: int,
        warn: Callable[[str], None] = ignore,
        dtype: torch.dtype = torch.float32,
        *,
        has_t5: bool = True,
    ) -> Self:
        """Read the text encoders of a pipeline folder; errors as in `load_model`.

        Args:
            folder: of the pipeline.
            width: D.
            warn: called once for each tower if captions are cut.
            dtype: of the weights.
            has_t5: whether the folder has a T5 that is wanted.
        """
        first, second = (
            CLIPTextEncoder.load(
                folder / name, warn, dtype, model_class=CLIPTextModelWithProjection, is_penultimate=True
            )
            for name in (TEXT_ENCODER, TEXT_ENCODER_2)
        )
        return cls(first, second, T5TextEncoder.load(folder / TEXT_ENCODER_3, dtype) if has_t5 else None, width)

    def save(self, folder: Path) -> None:
        """Write encoders and tokenizers into a pipeline folder; errors as in `save_model`."""
        self.first.save(folder, TEXT_ENCODER)
        self.second.save(folder, TEXT_ENCODER_2)
        if self.third is not None:
            self.third.save(folder)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """All encoders."""
        return (*self.first.models, *self.second.models, *([self.third.model] if self.third else []))

    @property
    def key(self) -> dict[str, str]:
        """See `Encoder`."""
        second = {f"{name}_2": value for name, value in self.second.key.items()}
        return {**self.first.key, **second, **(self.third.key if self.third else {}), "width": str(self.width)}

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Of B captions, on the host: `ids` and `ids_2`, int64 [B, L]; with T5 `ids_3`, int64 [B, 256]."""
        found = {**self.first.tokens(captions), "ids_2": self.second.tokens(captions)["ids"]}
        return found if self.third is None else {**found, "ids_3": self._t5_ids(captions, ignore)}

    @torch.no_grad()
    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Condition:
        """B rows from the `tokens` of captions, on any device."""
        towers = {"ids": self.first, "ids_2": self.second}
        conditions = [tower.encode_tokens({"ids": tokens[name]}) for name, tower in towers.items()]
        return self._joined(conditions, tokens.get("ids_3"))

    @property
    def index_settings(self) -> dict[str, int]:
        """What the index of a pipeline says about the encoder."""
        return self.first.index_settings

    def check(self, reading: PromptReading) -> None:
        """See `Encoder`."""
        self.first.check(reading)
        self.second.check(reading)

    def num_chunks(self, prompt: str, reading: PromptReading) -> int:
        """See `Encoder`."""
        return max(self.first.num_chunks(prompt, reading), self.second.num_chunks(prompt, reading))

    @torch.inference_mode()
    def encode_prompts(
        self, prompts: Sequence[str], reading: PromptReading, *, num_chunks: int, warn: Callable[[str], None]
    ) -> Condition:
        """B prompts in one batch; weights of words, chunks and `clip_skip` are of the towers of CLIP. See `Encoder`."""
        towers = self.first, self.second
        conditions = [tower.encode_prompts(prompts, reading, num_chunks=num_chunks, warn=warn) for tower in towers]
        if self.third is None:
            return self._joined(conditions, None)
        plain = ["".join(piece.text for piece in pieces_of(prompt, reading)) for prompt in prompts]
        plain = [BREAK.sub(" ", text) for text in plain] if reading.long else plain
        return self._joined(conditions, self._t5_ids(plain, warn))

    def _t5_ids(self, texts: Sequence[str], warn: Callable[[str], None]) -> Tensor:
        assert self.third is not None
        tokens = self.third.tokenizer.encode(texts, T5_LENGTH)
        for index, rest in tokens.truncated:
            warn(
                f"prompt {texts[index][:40]!r}… has more than {T5_LENGTH - 1} tokens of T5; this was cut: {rest!r:.200}"
            )
        return tokens.input_ids

    def _joined(self, conditions: Sequence[Condition], ids_3: Tensor | None) -> Condition:
        """The conditions of the towers and the token ids of T5, as one."""
        clip = torch.cat([c.tokens for c in conditions if c.tokens is not None], dim=-1)
        pooled = torch.cat([c.pooled for c in conditions if c.pooled is not None], dim=-1)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        if self.third is None or ids_3 is None:
            states = clip.new_zeros(len(clip), T5_LENGTH, self.width)
        else:
            states = self.third.encode(ids_3).to(clip.dtype)
        return Condition(tokens=torch.cat([clip, states], dim=1), pooled=pooled)
