"""CLIP's text tower and its tokenizer: captions and prompts to what a denoiser is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.families.caption_tokens import CaptionTokens
from ldm_cli.families.family import model_sha256
from ldm_cli.families.prompt_chunks import PromptReading, TokenRow, chunks_of
from ldm_cli.formats.model_folder import ModelClass, load_model, outline_model
from ldm_cli.formats.model_source import has_model_json, outside_file, read_model_json, split_at_file
from ldm_cli.formats.open_clip_folder import OPEN_CLIP_CONFIG
from ldm_cli.formats.pipeline_folder import CLIP_SKIP, INDEX_NAME, TEXT_ENCODER, tokenizer_of
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS


def ignore(message: str) -> None:
    """Say nothing."""


class CLIPTextEncoder:
    """An `Encoder`; its conditions hold `tokens` [B, L, D], and `pooled` [B, P] of a tower with projection."""

    def __init__(
        self,
        model: CLIPTextModel,
        tokenizer: Tokenizer,
        folder: Path | None = None,
        warn: Callable[[str], None] = ignore,
        *,
        is_penultimate: bool = False,
        clip_skip: int | None = None,
        caption_chunks: int = 1,
        is_for_pixels: bool = False,
    ) -> None:
        """Put a tower and its tokenizer together.

        Args:
            folder: where the tower was read, for `key`.
            warn: called once if captions are cut.
            is_penultimate: whether `tokens` are the output of the last layer but one, without the final norm, as in
                SDXL, instead of the last hidden states.
            clip_skip: the layer to take in place of that, counted from the last one, which is 1; the final norm is
                applied or not as before.
            caption_chunks: chunks that each caption of a batch is encoded in.
            is_for_pixels: whether no token sees padding, as in the pipelines of IF.
        """
        self.model, self.tokenizer = model, tokenizer
        self._folder, self._is_penultimate, self.clip_skip = folder, is_penultimate, clip_skip
        self._is_for_pixels = is_for_pixels
        self._caption_tokens = CaptionTokens(tokenizer, self.length, warn, caption_chunks)

    @classmethod
    def load(
        cls,
        folder: Path,
        warn: Callable[[str], None] = ignore,
        dtype: torch.dtype = torch.float32,
        *,
        model_class: ModelClass[CLIPTextModel] = CLIPTextModel,
        is_penultimate: bool = False,
        clip_skip: int | None = None,
        caption_chunks: int = 1,
        is_for_pixels: bool = False,
    ) -> Self:
        """Read the folder of a text tower or of a whole CLIP; errors as in `load_model`.

        Args:
            folder: of a CLIPTextModel, CLIPTextModelWithProjection or CLIPModel.
            warn: called once if captions are cut.
            dtype: of the tower's weights.
            model_class: of the tower; with projection or without.
            is_penultimate, caption_chunks, is_for_pixels: as for the class.
            clip_skip: as for the class; None: as the pipeline says in which the tower lies.
        """
        model = load_model(model_class, folder, text_config_of, allow_extra=True, dtype=dtype)
        return cls(
            model,
            Tokenizer.load(tokenizer_folder(folder)),
            folder,
            warn,
            is_penultimate=is_penultimate,
            clip_skip=clip_skip or clip_skip_of(folder),
            caption_chunks=caption_chunks,
            is_for_pixels=is_for_pixels,
        )

    def save(self, folder: Path, component: str = TEXT_ENCODER) -> None:
        """Write tower and tokenizer as a component of a pipeline folder; errors as in `save_model`."""
        save_tower(folder / component, self.model, self.model.state_dict())
        # diffusers pads to what the tokenizer says; the tower takes no more than it has positions.
        self.tokenizer.model_max_length = self.length
        self.tokenizer.save(folder / tokenizer_of(component))

    @property
    def models(self) -> tuple[CLIPTextModel, ...]:
        """The tower."""
        return (self.model,)

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.hidden_size

    @property
    def length(self) -> int:
        """L, tokens of a chunk, both special tokens included."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @property
    def key(self) -> dict[str, str]:
        """Hashes of the tower and of the tokenizer; of an encoder that was read from a folder."""
        assert self._folder is not None
        return encoder_key(self._folder, self.tokenizer)

    @property
    def index_settings(self) -> dict[str, int]:
        """What the index of a pipeline says about the encoder."""
        return {} if self.clip_skip is None else {CLIP_SKIP: self.clip_skip}

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Of B captions, on the host: `ids`, int64 [B, n·L] for n chunks."""
        return {"ids": self._caption_tokens(captions)}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Condition:
        """B rows from the `tokens` of captions, on any device."""
        return self._condition(tokens["ids"], self.clip_skip)

    def check(self, reading: PromptReading) -> None:
        """See `Encoder`."""
        layers = self.model.config.num_hidden_layers
        if (skip := reading.clip_skip or self.clip_skip or 1) > layers:
            raise UsageError(f"clip_skip={skip} is not possible", f"a text encoder has {layers} layers")

    def num_chunks(self, prompt: str, reading: PromptReading) -> int:
        """See `Encoder`."""
        return len(chunks_of(prompt, self.tokenizer, self.length - 2, reading)) if reading.long else 1

    @torch.inference_mode()
    def encode_prompts(
        self, prompts: Sequence[str], reading: PromptReading, *, num_chunks: int, warn: Callable[[str], None]
    ) -> Condition:
        """B prompts in one batch; see `Encoder`. `pooled` is that of the first chunk."""
        rows = [TokenRow.of(prompt, self.tokenizer, self.length, reading, num_chunks) for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if row.cut:
                places = self.length - 2
                warn(
                    f"prompt {prompt[:40]!r}… has more than {places} tokens; this was cut: {_shortened(row.cut)!r}; "
                    "--long-prompts (sampling.long_prompts=true) keeps it"
                )
        skip = reading.clip_skip or self.clip_skip
        condition = self._condition(torch.tensor([row.ids for row in rows]), skip)
        states = condition.tokens
        if states is None or all(weight == 1.0 for row in rows for weight in row.weights):
            return condition
        # Away from the empty prompt's states and towards them, place by place: a weight of 1 changes nothing.
        empty = self._condition(self.tokenizer.encode([""], self.length).input_ids, skip).tokens
        assert empty is not None
        shares = torch.tensor([row.weights for row in rows])[..., None]
        shares = shares.to(states.device, states.dtype, non_blocking=True)
        return replace(condition, tokens=torch.lerp(empty.repeat(1, num_chunks, 1), states, shares))

    def _condition(self, ids: Tensor, clip_skip: int | None) -> Condition:
        """Of token ids int64 [B, n·L]; the states of the n chunks lie side by side."""
        ids = ids.to(next(self.model.parameters()).device, non_blocking=True)
        rows, chunks = len(ids), ids.shape[1] // self.length
        layer = clip_skip or (2 if self._is_penultimate else 1)
        has_norm = not self._is_penultimate
        output = self.model(
            ids.view(rows * chunks, -1),
            output_hidden_states=layer > 1 or not has_norm,
            hides_padding=self._is_for_pixels,
        )
        if layer == 1 and has_norm:
            tokens = output.last_hidden_state
        else:
            tokens = output.hidden_states[-layer]
            tokens = self.model.text_model.final_layer_norm(tokens) if has_norm else tokens
        pooled = self.model.project(output) if isinstance(self.model, CLIPTextModelWithProjection) else None
        tokens = tokens.view(rows, -1, tokens.shape[-1])
        return Condition(tokens=tokens, pooled=None if pooled is None else pooled[::chunks])


def save_tower(folder: Path, tower: CLIPTextModel, weights: Mapping[str, Tensor]) -> None:
    """Write a tower with its own or other weights; errors as in `save_model`."""
    config = {**tower.config.to_hugging_face(), "architectures": [type(tower).__name__]}
    save_model(folder, weights, config, TRANSFORMERS_WEIGHTS)


def outline_tower(folder: Path, model_class: ModelClass[CLIPTextModel] = CLIPTextModel) -> CLIPTextModel:
    """The `outline_model` of the tower that `CLIPTextEncoder.load` reads."""
    return outline_model(model_class, folder, text_config_of, allow_extra=True)


def outline_encoder(folder: Path, model_class: ModelClass[CLIPTextModel] = CLIPTextModel) -> CLIPTextEncoder:
    """The encoder of a folder on the meta device, with its tokenizer; errors as in `outline_model`."""
    return CLIPTextEncoder(outline_tower(folder, model_class), Tokenizer.load(tokenizer_folder(folder)))


def tokenizer_folder(text_encoder: Path) -> Path:
    """Where the tokenizer of a tower lies: in the same folder, or in `tokenizer` beside it, as in pipelines.

    That of `text_encoder_2` is `tokenizer_2`, that of `prior_text_encoder` `prior_tokenizer`. Folders of open_clip hold
    it beside the file of weights.

    Raises:
        InputNotFoundError: the tower is in a single file, and there is no such folder beside that.
    """
    if (found := split_at_file(text_encoder)) is not None:
        if (found[0].parent / OPEN_CLIP_CONFIG).is_file():
            return found[0].parent
        return outside_file(found[0], tokenizer_of(found[1].name or TEXT_ENCODER))
    beside = text_encoder.parent / tokenizer_of(text_encoder.name)
    return beside if TEXT_ENCODER in text_encoder.name and beside.is_dir() else text_encoder


def index_setting(component: Path, name: str, default: Any) -> Any:
    """What the index of the pipeline in which a component lies says; the default without a pipeline."""
    index = component.parent / INDEX_NAME
    return read_model_json(index).get(name, default) if has_model_json(index) else default


def clip_skip_of(text_encoder: Path) -> int | None:
    """The `clip_skip` that the pipeline of a tower was trained with; None: that of its kind.

    Raises:
        CheckpointError: it is no number of a layer.
    """
    found = index_setting(text_encoder, CLIP_SKIP, None)
    if found is None or (isinstance(found, int) and found >= 1):
        return found
    raise CheckpointError(f"cannot use '{text_encoder.parent / INDEX_NAME}'", f"{CLIP_SKIP}={found!r} is no layer")


def encoder_key(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """`CLIPTextEncoder.key` of a folder, whose tower is not read."""
    return {"text_encoder": model_sha256(folder), "tokenizer": tokenizer.fingerprint}


def text_config_of(mapping: Mapping[str, Any]) -> CLIPTextConfig:
    """The text tower's configuration in a config.json of its own or of a whole CLIP."""
    if "text_config" in mapping:
        whole = CLIPConfig.from_hugging_face(mapping)
        return whole.text_config.model_copy(update={"projection_dim": whole.projection_dim})
    return CLIPTextConfig.from_hugging_face(mapping)


def _shortened(text: str, length: int = 100) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= 2 * length else f"{text[:length]} … {text[-length:]}"
