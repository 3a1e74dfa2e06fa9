"""The configuration of unCLIP's prior, without torch: recipes are checked by it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.core.models.model_config import Depth, DiffusersConfig, Size, Zero


class PriorTransformerConfig(DiffusersConfig):
    """The prior; all fields of diffusers' PriorTransformer, with the values that are implemented."""

    hugging_face_class: ClassVar[str] = "PriorTransformer"

    num_attention_heads: Size = 32
    """Attention heads; the width of the network is this times `attention_head_dim`."""
    attention_head_dim: Size = 64
    """Width of an attention head."""
    num_layers: Depth = 20
    """Transformer blocks."""
    embedding_dim: Size = 768
    """Size of the image and text embeddings, and of the text states: CLIP's `projection_dim` and `hidden_size`."""
    num_embeddings: Size = 77
    """Tokens of a caption."""
    additional_embeddings: Annotated[int, Field(ge=4, le=4)] = 4
    """Tokens after the caption's: text embedding, time, noisy image embedding, and the one that becomes the answer."""
    dropout: Zero = 0.0
    """Not supported: it would draw from a global random generator, and runs could not be repeated exactly."""
    time_embed_act_fn: Literal["silu"] = "silu"
    """Activation between the layers of the time embedding."""
    norm_in_type: None = None
    """Not supported."""
    embedding_proj_norm_type: None = None
    """Not supported."""
    encoder_hid_proj_type: Literal["linear"] = "linear"
    """How text states are brought to the width of the network."""
    added_emb_type: Literal["prd"] = "prd"
    """The answer is read off a learnt last token."""
    time_embed_dim: None = None
    """Not supported: the layers of the time embedding have the width of the network."""
    embedding_proj_dim: None = None
    """Not supported: the text embedding has the size `embedding_dim`."""
    clip_embed_dim: None = None
    """Not supported: the predicted embedding has the size `embedding_dim`."""

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % 2:
            raise ValueError(f"the width {self.width} is odd; the sinusoids of the time come in pairs")
        return self
