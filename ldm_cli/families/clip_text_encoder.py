"""CLIP's text tower and its tokenizer: captions and prompts to the tokens that a denoiser attends to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.families.caption_tokens import CaptionTokens
from ldm_cli.families.family import model_sha256
from ldm_cli.families.prompt_weights import WeightedText, parse_weights
from ldm_cli.formats.model_folder import load_model
from ldm_cli.formats.model_source import outside_file, split_at_file
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TOKENIZER
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS


def _ignore(message: str) -> None:
    """Say nothing."""


class CLIPTextEncoder:
    """An `Encoder`; its conditions hold `tokens`, the tower's last hidden states [B, L, D]."""

    def __init__(
        self,
        model: CLIPTextModel,
        tokenizer: Tokenizer,
        folder: Path | None = None,
        warn: Callable[[str], None] = _ignore,
    ) -> None:
        """Put a tower and its tokenizer together.

        Args:
            model: the tower.
            tokenizer: its tokenizer.
            folder: where the tower was read, for `key`.
            warn: called once if captions are cut.
        """
        self.model, self.tokenizer = model, tokenizer
        self._folder = folder
        self._caption_tokens = CaptionTokens(tokenizer, self.length, warn)

    @classmethod
    def load(
        cls, folder: Path, warn: Callable[[str], None] = _ignore, dtype: torch.dtype = torch.float32
    ) -> CLIPTextEncoder:
        """Read a CLIPTextModel folder, or the text tower of a CLIPModel folder; errors as in `load_model`.

        Args:
            folder: of the tower.
            warn: called once if captions are cut.
            dtype: of the tower's weights.
        """
        model = load_model(CLIPTextModel, folder, text_config_of, allow_extra=True, dtype=dtype)
        return cls(model, Tokenizer.load(tokenizer_folder(folder)), folder, warn)

    def save(self, folder: Path, tokenizer: Path) -> None:
        """Write the tower and the tokenizer into their folders; errors as in `save_model`."""
        save_model(folder, self.model.state_dict(), self.model.config.to_hugging_face(), TRANSFORMERS_WEIGHTS)
        # diffusers pads to what the tokenizer says; the tower takes no more than it has positions.
        self.tokenizer.model_max_length = self.length
        self.tokenizer.save(tokenizer)

    @property
    def length(self) -> int:
        """L, tokens per prompt, both special tokens included."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @property
    def key(self) -> dict[str, str]:
        """Hashes of the tower and of the tokenizer; of an encoder that was read from a folder."""
        assert self._folder is not None
        return encoder_key(self._folder, self.tokenizer)

    @property
    def empty(self) -> Condition:
        """The condition of the empty prompt: one row."""
        return self.encode([""])

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Condition:
        """B captions in one batch: B rows."""
        return Condition(tokens=self._states(self._caption_tokens(captions)))

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
        states = self._states(torch.tensor(rows))
        if all(weight == 1.0 for own in weights for weight in own):
            return Condition(tokens=states)
        # Away from the empty prompt's states and towards them, place by place: a weight of 1 changes nothing.
        empty = self._states(self.tokenizer.encode([""], self.length).input_ids)
        shares = torch.tensor(weights)[..., None].to(states.device, states.dtype, non_blocking=True)
        return Condition(tokens=torch.lerp(empty, states, shares))

    def _states(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, L] → [B, L, D]."""
        device = next(self.model.parameters()).device
        states: Tensor = self.model(ids.to(device, non_blocking=True)).last_hidden_state
        return states

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


def tokenizer_folder(text_encoder: Path) -> Path:
    """Where the tokenizer of a tower lies: in the same folder, or in `tokenizer` beside it, as in pipelines.

    Raises:
        InputNotFoundError: the tower is in a single file, and there is no such folder beside that.
    """
    if (found := split_at_file(text_encoder)) is not None:
        return outside_file(found[0], TOKENIZER)
    beside = text_encoder.parent / TOKENIZER
    return beside if text_encoder.name == TEXT_ENCODER and beside.is_dir() else text_encoder


def encoder_key(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """`CLIPTextEncoder.key` of a folder, whose tower is not read."""
    return {"text_encoder": model_sha256(folder), "tokenizer": tokenizer.fingerprint}


def text_config_of(mapping: Mapping[str, Any]) -> CLIPTextConfig:
    """The text tower's configuration in a config.json of its own or of a whole CLIP."""
    if "text_config" in mapping:
        return CLIPConfig.from_hugging_face(mapping).text_config
    return CLIPTextConfig.from_hugging_face(mapping)


def _shortened(text: str, length: int = 100) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= 2 * length else f"{text[:length]} … {text[-length:]}"
