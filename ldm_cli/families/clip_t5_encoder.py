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
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.unigram_tokenizer import UnigramTokenizer
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, encoder_key, ignore, index_setting, tokenizer_folder
from ldm_cli.families.family import model_sha256
from ldm_cli.families.prompt_chunks import BREAK, PromptReading, pieces_of
from ldm_cli.formats.model_folder import load_model
from ldm_cli.formats.pipeline_folder import (
    INDEX_NAME,
    MAX_SEQUENCE_LENGTH,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TEXT_ENCODER_3,
    tokenizer_of,
)
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS

T5_LENGTH = 256
"""Tokens of T5, padding included: diffusers' default."""
LONGEST_T5 = 512
"""The most tokens of T5 that diffusers takes."""


class T5TextEncoder:
    """T5's encoder and its tokenizer.

    Attributes:
        folder: where the encoder was read, for `key`; None if it was not.
    """

    def __init__(self, model: T5EncoderModel, tokenizer: UnigramTokenizer, folder: Path | None = None) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> Self:
        """Read an encoder, and its tokenizer from `tokenizer_3` beside it or from the same folder.

        Args:
            dtype: of the weights. float16 becomes bfloat16, whose range the feed-forward layers need.

        Raises:
            InputNotFoundError, CheckpointError: as in `load_model`.
        """
        dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        return cls(
            load_model(T5EncoderModel, folder, dtype=dtype), UnigramTokenizer.load(tokenizer_folder(folder)), folder
        )

    def save(self, folder: Path, component: str = TEXT_ENCODER_3, length: int = T5_LENGTH) -> None:
        """Write encoder and tokenizer, for texts of a length, as a component of a pipeline folder; errors as in
        `save_model`."""
        weights, config = self.model.state_dict(), self.model.config.to_hugging_face()
        save_model(folder / component, weights, config, TRANSFORMERS_WEIGHTS)
        self.tokenizer.save(folder / tokenizer_of(component), length)

    @property
    def key(self) -> dict[str, str]:
        """Hashes of the encoder and of the tokenizer; of an encoder that was read from a folder."""
        assert self.folder is not None
        return _t5_key(self.folder, self.tokenizer)

    def ids(self, texts: Sequence[str], length: int, warn: Callable[[str], None]) -> Tensor:
        """Token ids int64 [B, L] of texts, on the host; `warn` is called for each text that is cut."""
        tokens = self.tokenizer.encode(texts, length)
        for index, rest in tokens.truncated:
            warn(f"prompt {texts[index][:40]!r}… has more than {length - 1} tokens of T5; this was cut: {rest!r:.200}")
        return tokens.input_ids

    def encode(self, ids: Tensor, *, hides_padding: bool = False) -> Tensor:
        """Token ids int64 [B, L], on any device → states [B, L, D]; padding is attended to, or hidden."""
        ids = ids.to(next(self.model.parameters()).device, non_blocking=True)
        states: Tensor = self.model(ids, ids != self.model.config.pad_token_id if hides_padding else None)
        return states


class CLIPT5Encoder:
    """An `Encoder` of two CLIP towers with projection, and of T5 or of nothing in its place.

    Its conditions hold `tokens` [B, L + M, D]: the penultimate states of the towers side by side, filled up with zeros,
    and after them T5's states, or zeros; and `pooled` [B, P + P'] of both towers.

    Attributes:
        first, second: the towers, each with its own tokenizer.
        third: T5; None: there is none.
        width: D, the denoiser's `joint_attention_dim`.
        t5_length: M.

    Raises:
        CheckpointError: the towers take different numbers of tokens, or there is no room for those of T5.
    """

    def __init__(
        self,
        first: CLIPTextEncoder,
        second: CLIPTextEncoder,
        third: T5TextEncoder | None,
        width: int,
        t5_length: int = T5_LENGTH,
    ) -> None:
        if first.length != second.length:
            cause = f"the first takes {first.length} tokens, the second {second.length}"
            raise CheckpointError("the text encoders do not fit together", cause)
        if third is not None and t5_length == 0:
            raise CheckpointError(
                "the text encoders do not fit together", f"{MAX_SEQUENCE_LENGTH}=0, but there is a T5"
            )
        self.first, self.second, self.third, self.width, self.t5_length = first, second, third, width, t5_length

    @classmethod
    def load(
        cls,
        folders: Sequence[Path],
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
            folders: of two CLIP towers with projection, or whole CLIPs; then that of T5, if there is one.
            width: D.
            warn: called once for each tower if captions are cut.
            dtype: of the weights.
            t5_length: M.
            t5_dtype: of the weights of T5; None: `dtype`.
            clip_skip, caption_chunks: of both towers, as in `CLIPTextEncoder.load`.
        """
        first, second = (
            CLIPTextEncoder.load(
                folder,
                warn,
                dtype,
                model_class=CLIPTextModelWithProjection,
                is_penultimate=True,
                clip_skip=clip_skip,
                caption_chunks=caption_chunks,
            )
            for folder in folders[:2]
        )
        third = T5TextEncoder.load(folders[2], t5_dtype or dtype) if len(folders) > 2 else None
        return cls(first, second, third, width, t5_length)

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
    def num_encoders(self) -> int:
        """N: 3, or 2 without T5."""
        return 2 if self.third is None else 3

    @property
    def key(self) -> dict[str, str]:
        """See `Encoder`."""
        third = {} if self.third is None else self.third.key
        return _key(self.first.key, self.second.key, third, self.width, self.t5_length)

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Of B captions, on the host: `ids` and `ids_2`, int64 [B, L]; with T5 `ids_3`, int64 [B, M]."""
        found = {**self.first.tokens(captions), "ids_2": self.second.tokens(captions)["ids"]}
        return found if self.third is None else {**found, "ids_3": self.third.ids(captions, self.t5_length, ignore)}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Condition:
        """B rows from the `tokens` of captions, on any device."""
        towers = {"ids": self.first, "ids_2": self.second}
        conditions = [tower.encode_tokens({"ids": tokens[name]}) for name, tower in towers.items()]
        return self._joined(conditions, tokens.get("ids_3"))

    def without(self, condition: Condition, is_left_out: Tensor) -> Condition:
        """The condition with zeros in place of what some encoders gave, as if these encoders were not there.

        Args:
            condition: B rows of this encoder.
            is_left_out: bool [B, N], of each of the N encoders.
        """
        assert condition.tokens is not None
        assert condition.pooled is not None
        first, second, *third = (~is_left_out).to(condition.tokens.dtype).chunk(is_left_out.shape[1], dim=1)
        one, other = self.first.model.config, self.second.model.config
        states = torch.cat([first.expand(-1, one.hidden_size), second.expand(-1, self.width - one.hidden_size)], dim=1)
        pooled = torch.cat([first.expand(-1, one.projection_dim), second.expand(-1, other.projection_dim)], dim=1)
        length = condition.tokens.shape[1] - self.t5_length
        clip, t5 = condition.tokens[:, :length] * states[:, None], condition.tokens[:, length:]
        t5 = t5 * third[0][:, None] if third else t5
        return Condition(tokens=torch.cat([clip, t5], dim=1), pooled=condition.pooled * pooled)

    @property
    def index_settings(self) -> dict[str, int]:
        """What the index of a pipeline says about the encoder."""
        length = {} if self.t5_length == T5_LENGTH else {MAX_SEQUENCE_LENGTH: self.t5_length}
        return self.first.index_settings | length

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
        return self._joined(conditions, self.third.ids(plain_texts(prompts, reading), self.t5_length, warn))

    def _joined(self, conditions: Sequence[Condition], ids_3: Tensor | None) -> Condition:
        """The conditions of the towers and the token ids of T5, as one."""
        clip = torch.cat([c.tokens for c in conditions if c.tokens is not None], dim=-1)
        pooled = torch.cat([c.pooled for c in conditions if c.pooled is not None], dim=-1)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        if self.third is None or ids_3 is None:
            states = clip.new_zeros(len(clip), self.t5_length, self.width)
        else:
            states = self.third.encode(ids_3).to(clip.dtype)
        return Condition(tokens=torch.cat([clip, states], dim=1), pooled=pooled)


def plain_texts(prompts: Sequence[str], reading: PromptReading) -> list[str]:
    """Prompts without the marks of weights and chunks."""
    plain = ["".join(piece.text for piece in pieces_of(prompt, reading)) for prompt in prompts]
    return [BREAK.sub(" ", text) for text in plain] if reading.long else plain


def t5_length_of(pipeline: Path) -> int:
    """M of a pipeline folder, as its index says.

    Raises:
        CheckpointError: it is no number of tokens.
    """
    found = index_setting(pipeline / TEXT_ENCODER, MAX_SEQUENCE_LENGTH, T5_LENGTH)
    if isinstance(found, int) and 0 <= found <= LONGEST_T5:
        return found
    raise CheckpointError(f"cannot use '{pipeline / INDEX_NAME}'", f"{MAX_SEQUENCE_LENGTH}={found!r} is no length")


def clip_t5_key(folders: Sequence[Path], width: int, t5_length: int) -> dict[str, str]:
    """`CLIPT5Encoder.key` of the folders of encoders, which are not read; arguments as in `CLIPT5Encoder.load`."""
    first, second = (encoder_key(folder, Tokenizer.load(tokenizer_folder(folder))) for folder in folders[:2])
    third = _t5_key(folders[2], UnigramTokenizer.load(tokenizer_folder(folders[2]))) if len(folders) > 2 else {}
    return _key(first, second, third, width, t5_length)


def _key(
    first: Mapping[str, str], second: Mapping[str, str], third: Mapping[str, str], width: int, t5_length: int
) -> dict[str, str]:
    sizes = {"width": str(width), MAX_SEQUENCE_LENGTH: str(t5_length)}
    return {**first, **{f"{name}_2": value for name, value in second.items()}, **third, **sizes}


def _t5_key(folder: Path, tokenizer: UnigramTokenizer) -> dict[str, str]:
    return {TEXT_ENCODER_3: model_sha256(folder), tokenizer_of(TEXT_ENCODER_3): tokenizer.fingerprint}
