"""CLIP's text tower: a causal Transformer over tokens (Radford et al. 2021, arXiv:2103.00020, 2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_cli.core.models.checkpointing import Checkpointable
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.core.models.clip_transformer import CLIPEncoder


@dataclass(frozen=True)
class TextOutput:
    """What a text tower returns.

    Attributes:
        last_hidden_state: [B, L, D], after the final layer norm.
        pooled: [B, D], the last hidden state at the end-of-text token.
        hidden_states: if asked for, the embeddings and the output of every layer, before the final norm, each
            [B, L, D]; entry -2 is the penultimate layer ("clip skip").
    """

    last_hidden_state: Tensor
    pooled: Tensor
    hidden_states: tuple[Tensor, ...] = ()


class _TextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, L] → [B, L, D]."""
        length, longest = input_ids.shape[-1], self.position_embedding.num_embeddings
        if length > longest:
            raise ValueError(f"{length} tokens, more than max_position_embeddings={longest}")
        hidden: Tensor = self.token_embedding(input_ids) + self.position_embedding.weight[:length]
        return hidden


class CLIPTextTransformer(nn.Module):
    """The text tower without a projection: `text_model` of the models that have one.

    Embeddings are initialised as OpenAI's: normal with deviation 0.02 for tokens, 0.01 for positions.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _TextEmbeddings(config)
        self.encoder = CLIPEncoder(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_act,
            config.layer_norm_eps,
            is_causal=True,
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, input_ids: Tensor, *, output_hidden_states: bool = False, hides_padding: bool = False
    ) -> TextOutput:
        """Token ids, int64 [B, L] → states and pooled feature.

        Causality hides the padding from the text; `hides_padding` hides it from the padding as well.
        """
        end = self._end_of_text(input_ids)
        mask = _mask(end, input_ids.shape[1]) if hides_padding else None
        states = self.encoder(self.embeddings(input_ids), mask, keep_all=output_hidden_states)
        last = self.final_layer_norm(states[-1])
        pooled = last[torch.arange(len(end), device=end.device), end]
        return TextOutput(last, pooled, states if output_hidden_states else ())

    def _end_of_text(self, input_ids: Tensor) -> Tensor:
        """Where features are pooled: the first end-of-text token; in legacy files the largest id: [B]."""
        if self.config.eos_token_id == 2:
            return input_ids.argmax(dim=-1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=-1)


def _mask(end: Tensor, length: int) -> Tensor:
    """Which tokens see which, if none sees what comes after it or after `end` [B]: bool [B, 1, L, L]."""
    position = torch.arange(length, device=end.device)
    seen = (position <= position[:, None]) & (position <= end[:, None, None])
    return seen[:, None]


class CLIPTextModel(Checkpointable):
    """A text tower on its own: the text encoder of Stable Diffusion."""

    config_class = CLIPTextConfig

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def forward(
        self, input_ids: Tensor, *, output_hidden_states: bool = False, hides_padding: bool = False
    ) -> TextOutput:
        """Token ids, int64 [B, L] → states and pooled feature; see `CLIPTextTransformer`."""
        output: TextOutput = self.text_model(
            input_ids, output_hidden_states=output_hidden_states, hides_padding=hides_padding
        )
        return output


class CLIPTextModelWithProjection(CLIPTextModel):
    """A text tower and its projection into the joint space, as in SDXL and Stable Diffusion 3."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        nn.init.normal_(self.text_projection.weight, std=config.hidden_size**-0.5)

    def project(self, output: TextOutput) -> Tensor:
        """The pooled feature in the joint space: [B, projection_dim], not normalised."""
        projected: Tensor = self.text_projection(output.pooled)
        return projected
