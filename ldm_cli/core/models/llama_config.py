"""The configuration of a decoder-only Transformer over text and picture tokens, without torch: recipes are checked by
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config
from ldm_cli.core.models.model_config import Depth, Size, TransformersConfig

_UNUSED = frozenset({"pretraining_tp", "rope_scaling", "rope_parameters"})
TokenId = Annotated[int, Field(ge=0, le=2**24)]


class PictureTokens(Config):
    """Where a sequence and its vocabulary hold a picture: `<start> caption <end> <end> … BEGIN codes END`.

    The vocabulary is T text tokens, then K codes, then BEGIN = T + K and END = T + K + 1.
    """

    text_length: Annotated[int, Field(ge=2, le=2**16)]
    """Tokens of a caption: start, text, end and padding."""
    image_token_offset: Size
    """T: code k of the VQ model is token T + k."""
    num_codes: Size
    """K, rows of the codebook."""
    grid: tuple[Size, Size]
    """Rows and columns of codes; they follow one another row by row."""
    vq_sha256: str
    """Hash of the VQ model's weights: the codes of another one mean other pictures."""

    @property
    def begin_id(self) -> int:
        """The token before the codes."""
        return self.image_token_offset + self.num_codes

    @property
    def end_id(self) -> int:
        """The token after the codes."""
        return self.begin_id + 1

    @property
    def vocab_size(self) -> int:
        """T + K + 2."""
        return self.end_id + 1

    @property
    def num_places(self) -> int:
        """Codes of a picture."""
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """Tokens of a whole sequence."""
        return self.text_length + self.num_places + 2


class LlamaConfig(TransformersConfig):
    """A Llama (Touvron et al. 2023, arXiv:2302.13971); fields of transformers' LlamaConfig, and `ldm`."""

    hugging_face_class: ClassVar[str] = "LlamaForCausalLM"

    model_type: Literal["llama"] = "llama"
    """Kind of the model in transformers."""
    vocab_size: Size = 32000
    """Rows of the table of tokens; `train-ar` sets it to what tokenizer and codebook need."""
    hidden_size: Size = 4096
    """Width D."""
    intermediate_size: Size = 11008
    """Width inside the feed-forward layers."""
    num_hidden_layers: Depth = 32
    """Blocks."""
    num_attention_heads: Size = 32
    """Heads of the queries."""
    num_key_value_heads: Size | None = None
    """Heads of keys and values, each shared by as many heads of the queries (Ainslie et al. 2023, arXiv:2305.13245);
    null: as many as there are."""
    head_dim: Size | None = None
    """Width of a head, an even number; null: `hidden_size / num_attention_heads`."""
    max_position_embeddings: Size = 2048
    """Longest sequence; `train-ar` sets it to the length of its own."""
    hidden_act: Literal["silu"] = "silu"
    """Activation of the gate."""
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """ε of the norms."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the wavelengths of rotary positions (Su et al. 2021, arXiv:2104.09864, section 3.4.3)."""
    attention_bias: Literal[False] = False
    """Biases of the attention's layers."""
    mlp_bias: Literal[False] = False
    """Biases of the feed-forward layers."""
    tie_word_embeddings: bool = False
    """Whether the table of tokens is the last layer's weight, too."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Deviation of fresh weights."""
    bos_token_id: TokenId | None = 1
    """Token at the start of a caption."""
    eos_token_id: TokenId | None = 2
    """Token after the codes."""
    pad_token_id: TokenId | None = None
    """Token after the end of a caption."""
    ldm: PictureTokens | None = None
    """What the tokens are; null before training: `train-ar` sets it."""

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.head_width % 2:
            raise ValueError(f"head_dim={self.head_width} is odd: rotary positions turn pairs")
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.key_value_heads}"
            )
        return self

    @classmethod
    def from_hugging_face(cls, mapping: Mapping[str, Any]) -> Self:
        """See `TransformersConfig`; rotary positions may be written as in transformers 4 or 5.

        Raises:
            ValueError: rotary positions are scaled.
        """
        rope = mapping.get("rope_parameters") or {}
        scaling = mapping.get("rope_scaling") or rope
        if scaling.get("rope_type", scaling.get("type", "default")) != "default":
            raise ValueError(f"rope_scaling={scaling!r} is not supported; expected null")
        found = {name: value for name, value in mapping.items() if name not in _UNUSED}
        return super().from_hugging_face(found | {n: v for n, v in rope.items() if n == "rope_theta"})

    def to_hugging_face(self, dtype: str = "float32") -> dict[str, Any]:
        """See `TransformersConfig`; rotary positions for transformers 4 and 5."""
        whole = {"num_key_value_heads": self.key_value_heads, "head_dim": self.head_width}
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        return super().to_hugging_face(dtype) | whole | {"rope_parameters": rope, "rope_scaling": None}
