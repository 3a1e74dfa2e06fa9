"""T5's encoder, and T5 as the only text encoder of a U-Net (Saharia et al. 2022, arXiv:2205.11487, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.t5_encoder import T5EncoderModel
from ldm_cli.data.unigram_tokenizer import UnigramTokenizer
from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, ignore, index_setting, outline_encoder, tokenizer_folder
from ldm_cli.families.family import model_sha256
from ldm_cli.families.prompt_chunks import BREAK, PromptReading, pieces_of
from ldm_cli.formats.model_folder import load_model, outline_model, read_config
from ldm_cli.formats.pipeline_folder import (
    INDEX_NAME,
    MAX_SEQUENCE_LENGTH,
    TEXT_ENCODER,
    TEXT_ENCODER_3,
    tokenizer_of,
)
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS

T5_LENGTH = 256
"""Tokens of T5, padding included: diffusers' default."""
LONGEST_T5 = 512
"""The most tokens of T5 that diffusers takes."""
PIXEL_T5_LENGTH = 77
"""Tokens of T5 in the pipelines of IF."""


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
        """See `t5_key`; of an encoder that was read from a folder."""
        assert self.folder is not None
        return t5_key(self.folder)

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.d_model

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


class T5Encoder:
    """An `Encoder`; its conditions hold `tokens` [B, L, D], padding included, as in the pipelines of diffusers.

    Attributes:
        model, tokenizer: T5's encoder and its tokenizer.
        length: L.
        is_for_pixels: whether texts are read as the pipelines of IF do: in lower case, and no token sees padding.
    """

    def __init__(self, text: T5TextEncoder, length: int, *, is_for_pixels: bool = False) -> None:
        self._text, self.length, self.is_for_pixels = text, length, is_for_pixels
        self.model, self.tokenizer = text.model, text.tokenizer

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype = torch.float32, length: int | None = None, *, is_for_pixels: bool = False
    ) -> Self:
        """Read the folder of a T5EncoderModel; errors as in `T5TextEncoder.load`.

        Args:
            dtype: of the weights.
            length: L; None: as the pipeline says in which the encoder lies.
            is_for_pixels: see the class.
        """
        length = length or t5_length_of(folder, PIXEL_T5_LENGTH if is_for_pixels else T5_LENGTH)
        return cls(T5TextEncoder.load(folder, dtype), length, is_for_pixels=is_for_pixels)

    def save(self, folder: Path) -> None:
        """Write encoder and tokenizer as components of a pipeline folder; errors as in `save_model`."""
        self._text.save(folder, TEXT_ENCODER, self.length)

    @property
    def models(self) -> tuple[T5EncoderModel, ...]:
        """The encoder."""
        return (self.model,)

    @property
    def width(self) -> int:
        """D."""
        return self._text.width

    @property
    def key(self) -> dict[str, str]:
        """See `Encoder`."""
        assert self._text.folder is not None
        return t5_key(self._text.folder, TEXT_ENCODER) | {MAX_SEQUENCE_LENGTH: str(self.length)}

    @property
    def index_settings(self) -> dict[str, int]:
        """What the index of a pipeline says about the encoder."""
        return {MAX_SEQUENCE_LENGTH: self.length}

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Of B captions, on the host: `ids`, int64 [B, L]."""
        return {"ids": self._ids(captions, ignore)}

    def _ids(self, texts: Sequence[str], warn: Callable[[str], None]) -> Tensor:
        """As `T5TextEncoder.ids`."""
        read = [text.lower().strip() for text in texts] if self.is_for_pixels else texts
        return self._text.ids(read, self.length, warn)

    @torch.no_grad()
    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Condition:
        """B rows from the `tokens` of captions, on any device."""
        return Condition(tokens=self._text.encode(tokens["ids"], hides_padding=self.is_for_pixels))

    def check(self, reading: PromptReading) -> None:
        """See `Encoder`."""
        if reading.clip_skip is not None:
            raise UsageError(f"clip_skip={reading.clip_skip} is not possible", "the text encoder is T5")

    def num_chunks(self, prompt: str, reading: PromptReading) -> int:
        """Always 1: T5 takes as many tokens as it is given."""
        return 1

    @torch.inference_mode()
    def encode_prompts(
        self, prompts: Sequence[str], reading: PromptReading, *, num_chunks: int, warn: Callable[[str], None]
    ) -> Condition:
        """B prompts in one batch, without weights of words. See `Encoder`."""
        return self.encode_tokens({"ids": self._ids(plain_texts(prompts, reading), warn)})


def plain_texts(prompts: Sequence[str], reading: PromptReading) -> list[str]:
    """Prompts without the marks of weights and chunks."""
    plain = ["".join(piece.text for piece in pieces_of(prompt, reading)) for prompt in prompts]
    return [BREAK.sub(" ", text) for text in plain] if reading.long else plain


def is_t5(folder: Path) -> bool:
    """Whether a folder holds T5's encoder; errors as in `read_config`."""
    return read_config(folder).get("model_type") == "t5"


def t5_length_of(text_encoder: Path, default: int = T5_LENGTH) -> int:
    """Tokens of T5, as the pipeline says in which a text encoder lies; the default without a pipeline.

    Raises:
        CheckpointError: it is no number of tokens.
    """
    found = index_setting(text_encoder, MAX_SEQUENCE_LENGTH, default)
    if isinstance(found, int) and 0 <= found <= LONGEST_T5:
        return found
    raise CheckpointError(
        f"cannot use '{text_encoder.parent / INDEX_NAME}'", f"{MAX_SEQUENCE_LENGTH}={found!r} is no length"
    )


def t5_key(folder: Path, component: str = TEXT_ENCODER_3) -> dict[str, str]:
    """Hashes of the encoder in a folder, which is not read, and of its tokenizer, under the names of a component."""
    tokenizer = UnigramTokenizer.load(tokenizer_folder(folder)).fingerprint
    return {component: model_sha256(folder), tokenizer_of(component): tokenizer}


def load_text(folder: Path, dtype: torch.dtype, *, is_for_pixels: bool = False) -> CLIPTextEncoder | T5Encoder:
    """Read the only text encoder of a U-Net, of either kind; arguments and errors as in its `load`."""
    kind = T5Encoder if is_t5(folder) else CLIPTextEncoder
    return kind.load(folder, dtype=dtype, is_for_pixels=is_for_pixels)


def outline_text(folder: Path) -> CLIPTextEncoder | T5Encoder:
    """The encoder of `load_text` on the meta device, with its tokenizer; errors as in `outline_model`."""
    return T5Encoder(outline_t5(folder), t5_length_of(folder)) if is_t5(folder) else outline_encoder(folder)


def outline_t5(folder: Path) -> T5TextEncoder:
    """The encoder on the meta device, with its tokenizer; errors as in `outline_model`."""
    return T5TextEncoder(outline_model(T5EncoderModel, folder), UnigramTokenizer.load(tokenizer_folder(folder)))
