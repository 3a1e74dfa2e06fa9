"""The configuration of T5's encoder, without torch: recipes are checked by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ldm_cli.core.models.model_config import Depth, Size, TransformersConfig

_UNUSED = frozenset(
    {
        *("classifier_dropout", "dense_act_fn", "dropout_rate", "is_gated_act", "n_positions", "num_decoder_layers"),
        *("output_past", "scale_decoder_outputs"),
    }
)


class T5EncoderConfig(TransformersConfig):
    """The encoder of T5 version 1.1; fields of transformers' T5Config."""

    hugging_face_class: ClassVar[str] = "T5EncoderModel"

    model_type: Literal["t5"] = "t5"
    """Kind of the model in transformers."""
    vocab_size: Size = 32128
    """Rows of the table of tokens."""
    d_model: Size = 512
    """Width."""
    d_kv: Size = 64
    """Width of an attention head."""
    d_ff: Size = 2048
    """Width inside the feed-forward layers."""
    num_layers: Depth = 6
    """Blocks."""
    num_heads: Size = 8
    """Attention heads."""
    feed_forward_proj: Literal["gated-gelu"] = "gated-gelu"
    """Feed-forward layers of version 1.1; the ReLU of version 1.0 is not supported."""
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=1024)] = 32
    """Distances that have a bias of their own, of both signs."""
    relative_attention_max_distance: Annotated[int, Field(ge=4, le=2**20)] = 128
    """From this distance on all have the same."""
    layer_norm_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """ε of the norms."""
    pad_token_id: Annotated[int, Field(ge=0)] = 0
    """Token after the end of a text."""
    eos_token_id: Annotated[int, Field(ge=0)] = 1
    """Token at the end of a text."""

    @property
    def hidden_size(self) -> int:
        """`d_model`, by the name that all models of transformers know."""
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        """`num_layers`, by the name that all models of transformers know."""
        return self.num_layers

    @classmethod
    def from_hugging_face(cls, mapping: Mapping[str, Any]) -> Self:
        """See `TransformersConfig`; fields of the decoder, and those that follow from others, are left out."""
        return super().from_hugging_face({name: value for name, value in mapping.items() if name not in _UNUSED})

    def to_hugging_face(self, dtype: str = "float32") -> dict[str, Any]:
        """See `TransformersConfig`."""
        fixed = {"dense_act_fn": "gelu_new", "is_gated_act": True, "is_encoder_decoder": False, "use_cache": False}
        return super().to_hugging_face(dtype) | fixed | {"dropout_rate": 0.0, "tie_word_embeddings": False}
