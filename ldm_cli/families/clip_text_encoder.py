"""CLIP's text tower and its tokenizer: captions and prompts to what a denoiser is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.families.caption_tokens import CaptionTokens
from ldm_cli.families.family import model_sha256
from ldm_cli.families.prompt_weights import WeightedText, parse_weights
from ldm_cli.formats.model_folder import ModelClass, load_model, outline_model
from ldm_cli.formats.model_source import outside_file, split_at_file
from ldm_cli.formats.open_clip_folder import OPEN_CLIP_CONFIG
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_2, tokenizer_of
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
    ) -> None:
        """Put a tower and its tokenizer together.

        Args:
            model: the tower.
            tokenizer: its tokenizer.
            folder: where the tower was read, for `key`.
            warn: called once if captions are cut.
            is_penultimate: whether `tokens` are the output of the last layer but one, without the final norm, as in
                SDXL, instead of the last hidden states.
        """
        self.model, self.tokenizer = model, tokenizer
        self._folder, self._is_penultimate = folder, is_penultimate
        self._caption_tokens = CaptionTokens(tokenizer, self.length, warn)

    @classmethod
    def load(
        cls,
        folder: Path,
        warn: Callable[[str], None] = ignore,
        dtype: torch.dtype = torch.float32,
        *,
        model_class: ModelClass[CLIPTextModel] = CLIPTextModel,
        is_penultimate: bool = False,
    ) -> CLIPTextEncoder:
        """Read the folder of a text tower or of a whole CLIP; errors as in `load_model`.

        Args:
            folder: of a CLIPTextModel, CLIPTextModelWithProjection or CLIPModel.
            warn: called once if captions are cut.
            dtype: of the tower's weights.
            model_class: of the tower; with projection or without.
            is_penultimate: as for the class.
        """
        model = load_model(model_class, folder, text_config_of, allow_extra=True, dtype=dtype)
        return cls(model, Tokenizer.load(tokenizer_folder(folder)), folder, warn, is_penultimate=is_penultimate)

    def save(self, folder: Path, component: str = TEXT_ENCODER) -> None:
        """Write tower and tokenizer as a component of a pipeline folder; errors as in `save_model`."""
        config = {**self.model.config.to_hugging_face(), "architectures": [type(self.model).__name__]}
        save_model(folder / component, self.model.state_dict(), config, TRANSFORMERS_WEIGHTS)
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
        """L, tokens per prompt, both special tokens included."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @property
    def key(self) -> dict[str, str]:
        """Hashes of the tower and of the tokenizer; of an encoder that was read from a folder."""
        assert self._folder is not None
        return encoder_key(self._folder, self.tokenizer)

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Of B captions, on the host: `ids`, int64 [B, L]."""
        return {"ids": self._caption_tokens(captions)}

    @torch.no_grad()
    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Condition:
        """B rows from the `tokens` of captions, on any device."""
        return self._condition(tokens["ids"])

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str], *, weighted: bool, warn: Callable[[str], None]) -> Condition:
        """B prompts in one batch; see `Encoder`."""
        rows: list[list[int]] = []
        weights: list[list[float]] = []
        for prompt in prompts:
            ids, own, cut = self._weighted_ids(parse_weights(prompt) if weighted else [WeightedText(prompt, 1.0)])
            rows, weights = [*rows, ids], [*weights, own]
            if cut:
                places = self.length - 2
                warn(f"prompt {prompt[:40]!r}… has more than {places} tokens; this was cut: {_shortened(cut)!r}")
        condition = self._condition(torch.tensor(rows))
        states = condition.tokens
        if states is None or all(weight == 1.0 for own in weights for weight in own):
            return condition
        # Away from the empty prompt's states and towards them, place by place: a weight of 1 changes nothing.
        empty = self._condition(self.tokenizer.encode([""], self.length).input_ids).tokens
        assert empty is not None
        shares = torch.tensor(weights)[..., None].to(states.device, states.dtype, non_blocking=True)
        return replace(condition, tokens=torch.lerp(empty, states, shares))

    def _condition(self, ids: Tensor) -> Condition:
        """Of token ids int64 [B, L]."""
        ids = ids.to(next(self.model.parameters()).device, non_blocking=True)
        output = self.model(ids, output_hidden_states=self._is_penultimate)
        tokens = output.hidden_states[-2] if self._is_penultimate else output.last_hidden_state
        pooled = self.model.project(output) if isinstance(self.model, CLIPTextModelWithProjection) else None
        return Condition(tokens=tokens, pooled=pooled)

    def _weighted_ids(self, pieces: list[WeightedText]) -> tuple[list[int], list[float], str]:
        """L token ids, a weight for each, and the text that found no room."""
        places, cut = self.length - 2, ""
        ids: list[int] = []
        weights: list[float] = []
        for piece in pieces:
            room = places - len(ids)
            tokens = self.tokenizer.encode([piece.text], room + 2)
            cut += tokens.truncated[0][1] if tokens.truncated else ""
            num_tokens = tokens.num_tokens[0] - 2
            ids += tokens.input_ids[0, 1 : 1 + num_tokens].tolist()
            weights += [piece.weight] * num_tokens
        rest = places - len(ids)
        row = [self.tokenizer.start_id, *ids, self.tokenizer.end_id, *[self.tokenizer.pad_id] * rest]
        return row, [1.0, *weights, 1.0, *[1.0] * rest], cut


def outline_tower(folder: Path, model_class: ModelClass[CLIPTextModel] = CLIPTextModel) -> CLIPTextModel:
    """The `outline_model` of the tower that `CLIPTextEncoder.load` reads."""
    return outline_model(model_class, folder, text_config_of, allow_extra=True)


def tokenizer_folder(text_encoder: Path) -> Path:
    """Where the tokenizer of a tower lies: in the same folder, or in `tokenizer` beside it, as in pipelines.

    That of `text_encoder_2` is `tokenizer_2`. Folders of open_clip hold it beside the file of weights.

    Raises:
        InputNotFoundError: the tower is in a single file, and there is no such folder beside that.
    """
    if (found := split_at_file(text_encoder)) is not None:
        if (found[0].parent / OPEN_CLIP_CONFIG).is_file():
            return found[0].parent
        return outside_file(found[0], tokenizer_of(found[1].name or TEXT_ENCODER))
    beside = text_encoder.parent / tokenizer_of(text_encoder.name)
    return beside if text_encoder.name in (TEXT_ENCODER, TEXT_ENCODER_2) and beside.is_dir() else text_encoder


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
