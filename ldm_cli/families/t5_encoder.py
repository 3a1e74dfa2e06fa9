"""T5 as the only text encoder of a U-Net, Imagen's choice (Saharia et al. 2022, arXiv:2205.11487, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.t5_encoder import T5EncoderModel
from ldm_cli.data.unigram_tokenizer import UnigramTokenizer
from ldm_cli.errors import UsageError
from ldm_cli.families.clip_t5_encoder import T5_LENGTH, T5TextEncoder, plain_texts
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, ignore, index_setting, outline_encoder, tokenizer_folder
from ldm_cli.families.family import model_sha256
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.formats.model_folder import outline_model, read_config
from ldm_cli.formats.pipeline_folder import MAX_SEQUENCE_LENGTH, TEXT_ENCODER

PIXEL_T5_LENGTH = 77
"""L of the pipelines of IF."""


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
        return self.model.config.d_model

    @property
    def key(self) -> dict[str, str]:
        """See `Encoder`."""
        assert self._text.folder is not None
        return t5_key(self._text.folder, self.length)

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


def is_t5(folder: Path) -> bool:
    """Whether a folder holds T5's encoder; errors as in `read_config`."""
    return read_config(folder).get("model_type") == "t5"


def t5_length_of(folder: Path, default: int = T5_LENGTH) -> int:
    """L, as the pipeline says in which the encoder lies."""
    return int(index_setting(folder, MAX_SEQUENCE_LENGTH, default))


def t5_key(folder: Path, length: int) -> dict[str, str]:
    """`T5Encoder.key` of a folder, whose encoder is not read."""
    tokenizer = UnigramTokenizer.load(tokenizer_folder(folder)).fingerprint
    return {"text_encoder": model_sha256(folder), "tokenizer": tokenizer, MAX_SEQUENCE_LENGTH: str(length)}


def load_text(folder: Path, dtype: torch.dtype, *, is_for_pixels: bool = False) -> CLIPTextEncoder | T5Encoder:
    """Read the only text encoder of a U-Net, of either kind; arguments and errors as in its `load`."""
    kind = T5Encoder if is_t5(folder) else CLIPTextEncoder
    return kind.load(folder, dtype=dtype, is_for_pixels=is_for_pixels)


def outline_text(folder: Path) -> CLIPTextEncoder | T5Encoder:
    """The encoder of `load_text` on the meta device, with its tokenizer; errors as in `outline_model`."""
    if not is_t5(folder):
        return outline_encoder(folder)
    model, tokenizer = outline_model(T5EncoderModel, folder), UnigramTokenizer.load(tokenizer_folder(folder))
    return T5Encoder(T5TextEncoder(model, tokenizer), t5_length_of(folder))
