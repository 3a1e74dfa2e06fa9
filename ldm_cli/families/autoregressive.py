"""Pictures token by token (Ramesh et al. 2021, arXiv:2102.12092): a Transformer over the tokens of a caption and the
codes of a VQ model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm_cli.core.compiling import compile_regions, compile_whole
from ldm_cli.core.models.llama import LlamaForCausalLM
from ldm_cli.core.models.llama_config import LlamaConfig, PictureTokens
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.core.precision import DTYPES
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError
from ldm_cli.families.family import ImageGenerator, place
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.model_source import has_model_json, read_model_json, weights_sha256
from ldm_cli.formats.pipeline_folder import INDEX_NAME, TOKENIZER, TRANSFORMER, write_index
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS

VQ, CODES = "vq", "codes"
_CLASS = "AutoregressivePipeline"


class CodeGrid(nn.Module):
    """A `Codec` whose latents are the indices of a VQ model's codes, int64 [B, 1, h, w]."""

    channels = 1

    def __init__(self, vq: VQModel) -> None:
        super().__init__()
        self.vq = vq

    @property
    def factor(self) -> int:
        """See `Codec`."""
        return self.vq.factor

    def moments(self, images: Tensor) -> dict[str, Tensor]:
        """The indices, as int32."""
        return {CODES: self.vq.encode_indices(images)[:, None].int()}

    def latents(self, moments: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """The indices, which have no distribution."""
        return moments[CODES].long()

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] → indices."""
        return self.latents(self.moments(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Indices → images [B, 3, H, W], about [-1, 1], not clamped."""
        return self.vq.decode_indices(latents[:, 0])


@dataclass(frozen=True, eq=False)
class Autoregressive(ImageGenerator):
    """A Transformer over the tokens of a caption and a picture, and what both are made of.

    transformers opens the subfolder `transformer` as a LlamaForCausalLM, diffusers `vq` as a VQModel.

    Attributes:
        transformer: its configuration says where the tokens are (`ldm`).
        codec: images to indices of codes and back.
        folder: where it was read; None if it was not.
    """

    transformer: LlamaForCausalLM
    codec: CodeGrid
    tokenizer: Tokenizer
    folder: Path | None = None
    is_compiled: bool = False

    components: ClassVar[tuple[str, ...]] = (TRANSFORMER, VQ)

    @property
    def tokens(self) -> PictureTokens:
        """Where the tokens of a caption and a picture are."""
        return tokens_of(self.transformer.config)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.transformer.head_weight.device

    @property
    def sample_size(self) -> tuple[int, int]:
        """The grid of codes: the only size there is."""
        return self.tokens.grid

    def prompt_tokens(self, prompts: Sequence[str], warn: Callable[[str], None]) -> Tensor:
        """Token ids of B prompts on the device, int64 [B, L]; `warn` is called for each that is cut."""
        found = self.tokenizer.encode(prompts, self.tokens.text_length)
        for i, rest in found.truncated:
            warn(f"prompt {prompts[i][:40]!r}… has more than {self.tokens.text_length - 2} tokens; cut: {rest[:200]!r}")
        return found.input_ids.to(self.device, non_blocking=True)

    def save(self, folder: Path) -> None:
        """See `ImageGenerator`."""
        config = self.transformer.config.to_hugging_face()
        save_model(folder / TRANSFORMER, self.transformer.state_dict(), config, TRANSFORMERS_WEIGHTS)
        self.save_companions(folder)

    def save_companions(self, folder: Path) -> None:
        """Write all but the Transformer; errors as in `save`."""
        save_model(folder / VQ, self.codec.vq.state_dict(), self.codec.vq.config.to_hugging_face())
        self.tokenizer.model_max_length = self.tokens.text_length
        self.tokenizer.save(folder / TOKENIZER)
        classes = {TRANSFORMER: "LlamaForCausalLM", VQ: "VQModel", TOKENIZER: "CLIPTokenizer"}
        write_index(folder, _CLASS, classes, {})


def is_mine(folder: Path) -> bool:
    """Whether the folder holds such a model."""
    index = folder / INDEX_NAME
    return has_model_json(index) and read_model_json(index).get("_class_name") == _CLASS


def open_folder(folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False) -> Autoregressive:
    """Read a folder; see `open_family`. The VQ model stays in float32: rounding would choose other codes."""
    transformer = load_model(LlamaForCausalLM, folder / TRANSFORMER, dtype=DTYPES[precision])
    vq, tokenizer = load_model(VQModel, folder / VQ), Tokenizer.load(folder / TOKENIZER)
    _expect_fitting_parts(folder, transformer.config, vq, tokenizer)
    # Not tuned for a CPU: the tuned layers lose at the few rows of a token.
    transformer.requires_grad_(False).eval().to(device)
    place(device, torch.float32, vq)
    if compiled:
        compile_regions(transformer)
        compile_whole(vq.decoder, vq.encoder)
    return Autoregressive(transformer, CodeGrid(vq), tokenizer, folder, compiled)


def outline_folder(folder: Path) -> dict[str, nn.Module]:
    """See `outline_family`."""
    transformer = outline_model(LlamaForCausalLM, folder / TRANSFORMER)
    vq = outline_model(VQModel, folder / VQ)
    _expect_fitting_parts(folder, transformer.config, vq, Tokenizer.load(folder / TOKENIZER))
    return {TRANSFORMER: transformer, VQ: vq}


def tokens_of(config: LlamaConfig) -> PictureTokens:
    """What a configuration says of the tokens.

    Raises:
        ValueError: it says nothing.
    """
    if config.ldm is None:
        raise ValueError("config.json has no field 'ldm': it is no model of pictures")
    return config.ldm


def _expect_fitting_parts(folder: Path, config: LlamaConfig, vq: VQModel, tokenizer: Tokenizer) -> None:
    """Make sure that the parts of a folder belong together.

    Raises:
        CheckpointError: naming each problem.
    """
    tokens = config.ldm
    if tokens is None:
        cause = "config.json has no field 'ldm', which says what its tokens are"
        raise CheckpointError(f"cannot use '{folder / TRANSFORMER}'", cause, "give a model that train-ar made")
    pairs = [
        ("transformer.vocab_size", config.vocab_size, "ldm needs", tokens.vocab_size),
        ("transformer.max_position_embeddings", config.max_position_embeddings, "ldm needs", tokens.length),
        ("ldm.image_token_offset", tokens.image_token_offset, "the tokenizer's tokens", tokenizer.vocab_size),
        ("ldm.num_codes", tokens.num_codes, "vq.num_vq_embeddings", vq.config.num_vq_embeddings),
        ("ldm.vq_sha256", tokens.vq_sha256, "that of vq", weights_sha256(folder / VQ)),
    ]
    problems = [f"{a}={value}, {b}={expected}" for a, value, b, expected in pairs if value != expected]
    if problems:
        raise CheckpointError(f"the parts of '{folder}' do not fit", "; ".join(problems))
