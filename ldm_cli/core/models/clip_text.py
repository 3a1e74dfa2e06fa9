"""CLIP's text tower: a causal Transformer over tokens (Radford et al. 2021, arXiv:2103.00020, 2.4)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.core.models.model_config import Size, TransformersConfig

Activation = Literal["quick_gelu", "gelu"]


class CLIPTextConfig(TransformersConfig):
    """The text tower; fields as in transformers' CLIPTextConfig."""

    hugging_face_class: ClassVar[str] = "CLIPTextModel"

    model_type: Literal["clip_text_model"] = "clip_text_model"
    """Which network this is."""
    vocab_size: Size = 49408
    """Number of tokens."""
    hidden_size: Size = 512
    """Width of the Transformer."""
    intermediate_size: Size = 2048
    """Width of its feed-forward layers."""
    num_hidden_layers: Size = 12
    """Number of layers."""
    num_attention_heads: Size = 8
    """Attention heads; must divide `hidden_size`."""
    max_position_embeddings: Size = 77
    """Longest token sequence, both special tokens included."""
    hidden_act: Activation = "quick_gelu"
    """`quick_gelu` is x·sigmoid(1.702 x); `gelu` the exact one."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """ε of the layer norms."""
    projection_dim: Size = 512
    """Size of the embedding of a text tower with projection; a CLIPModel has its own `projection_dim`."""
    bos_token_id: int | None = 49406
    """Start-of-text token."""
    eos_token_id: int = 49407
    """End-of-text token: features are pooled where it first occurs. 2 (legacy files): at the largest id."""
    pad_token_id: int | None = 1
    """Padding token; has no effect on the model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_heads(self.hidden_size, self.num_attention_heads)
        return self


def check_heads(hidden_size: int, num_attention_heads: int) -> None:
    """Raise ValueError unless the heads share the width evenly."""
    if hidden_size % num_attention_heads:
        raise ValueError(
            f"num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}"
        )
