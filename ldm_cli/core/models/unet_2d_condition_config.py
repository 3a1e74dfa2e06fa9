"""The U-Net's configuration, without torch: recipes are checked by it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.core.models.model_config import Depth, DiffusersConfig, One, Size, Zero, plain_blocks

DownBlockType = Literal[
    "DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"
]
UpBlockType = Literal[
    "UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"
]
MidBlockType = Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"]
PerLevel = Size | tuple[Size, ...]
DepthPerLevel = Depth | tuple[Depth, ...]


class UNet2DConditionConfig(DiffusersConfig):
    """The U-Net; all fields of diffusers' UNet2DConditionModel, with the values that are implemented."""

    hugging_face_class: ClassVar[str] = "UNet2DConditionModel"

    sample_size: Size | tuple[Size, Size] | None = None
    """Height and width of the latents it is trained at, in latent pixels; for information."""
    in_channels: Size = 4
    """Channels of the noisy latent, plus those of what is concatenated to it."""
    out_channels: Size = 4
    """Channels of the prediction."""
    center_input_sample: Literal[False] = False
    """Not supported."""
    flip_sin_to_cos: bool = True
    """The timestep embedding is (cos, sin) rather than (sin, cos)."""
    freq_shift: int = 0
    """Subtracted from the divisor of the timestep frequencies: 0 in Stable Diffusion, 1 in DDPM."""
    block_out_channels: tuple[Size, ...] = (320, 640, 1280, 1280)
    """Channels per level, outermost first; each level but the last halves height and width."""
    down_block_types: tuple[DownBlockType, ...] = Field(
        default_factory=plain_blocks("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    )
    """One per level, outermost first: residual blocks alone, with Transformers that see the text, with attention of
    the pixels to one another; and as in IF, which halves the size in a residual block, alone or with attention to text
    and pixels at once. Default: Transformers on all but the innermost."""
    mid_block_type: MidBlockType | None = "UNetMidBlock2DCrossAttn"
    """Block at the lowest resolution: two residual blocks around attention; one residual block; or none."""
    up_block_types: tuple[UpBlockType, ...] = Field(
        default_factory=plain_blocks("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    )
    """One per level, innermost first. Default: Transformers on all but the innermost."""
    only_cross_attention: bool | tuple[bool, ...] = False
    """Whether Transformers attend to the text twice, and not to themselves, as one value or one per level; not the one
    in the middle. Stable Diffusion's upscaler has it, as its pictures are too large for more."""
    layers_per_block: DepthPerLevel = 2
    """Residual blocks per level on the way down, as one number or one per level; one more on the way up."""
    downsample_padding: Literal[1] = 1
    """Padding of the stride-2 convolutions."""
    mid_block_scale_factor: One = 1.0
    """Not supported."""
    dropout: Zero = 0.0
    """Not supported: it would draw from a global random generator, and runs could not be repeated exactly."""
    act_fn: Literal["silu", "swish", "gelu"] = "silu"
    """Activation; `swish` is another name of `silu`."""
    norm_num_groups: Size = 32
    """Groups of the group norms; must divide every entry of `block_out_channels`."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """ε of the group norms in residual blocks."""
    cross_attention_dim: PerLevel = 1280
    """Width of the text states, as one number or one per level."""
    transformer_layers_per_block: DepthPerLevel = 1
    """Transformer layers per attention, as one number or one per level."""
    reverse_transformer_layers_per_block: None = None
    """Not supported."""
    encoder_hid_dim: Size | None = None
    """Width of the text states before a linear layer brings them to `cross_attention_dim`; null: no such layer."""
    encoder_hid_dim_type: Literal["text_proj"] | None = None
    """`text_proj`, with `encoder_hid_dim`."""
    attention_head_dim: PerLevel = 8
    """*Number* of heads of the Transformers, as one number or one per level; the name is a slip of diffusers, kept for
    files. Of the other attentions it is the width of a head, as the name says."""
    num_attention_heads: None = None
    """Unused by diffusers, which refuses any value: say `attention_head_dim`."""
    dual_cross_attention: Literal[False] = False
    """Not supported."""
    use_linear_projection: bool = False
    """Linear layers rather than 1×1 convolutions around the Transformers (Stable Diffusion 2)."""
    class_embed_type: Literal["timestep", "identity", "projection"] | None = None
    """How class labels are embedded: null with `num_class_embeds` is a table."""
    addition_embed_type: Literal["text_time", "text"] | None = None
    """Added to the timestep embedding: pooled text and six sizes (`text_time`, SDXL), or an attention pooling of the
    text states (`text`, IF)."""
    addition_time_embed_dim: Size | None = None
    """Width of each size's embedding, for `text_time`."""
    num_class_embeds: Size | None = None
    """Number of classes of the table."""
    upcast_attention: bool = False
    """For information: our attention accumulates its softmax in fp32 whatever the type."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """`scale_shift`: the timestep embedding also scales the normalised activations of residual blocks (IF)."""
    resnet_skip_time_act: Literal[False] = False
    """Not supported."""
    resnet_out_scale_factor: One | None = 1.0
    """Not supported."""
    time_embedding_type: Literal["positional"] = "positional"
    """Sinusoidal timestep embedding."""
    time_embedding_dim: Size | None = None
    """Width of the timestep embedding; null: 4 × the outermost channels."""
    time_embedding_act_fn: None = None
    """Not supported."""
    timestep_post_act: None = None
    """Not supported."""
    time_cond_proj_dim: Annotated[int, Field(ge=4, le=2**20)] | None = None
    """Width of the embedding of the guidance scale, for models that were distilled with guidance."""
    conv_in_kernel: Literal[3] = 3
    """Kernel size of the first convolution."""
    conv_out_kernel: Literal[3] = 3
    """Kernel size of the last convolution."""
    projection_class_embeddings_input_dim: Size | None = None
    """Input width for `class_embed_type: projection` and `addition_embed_type: text_time`."""
    attention_type: Literal["default"] | None = "default"
    """Not supported."""
    class_embeddings_concat: Literal[False] = False
    """Not supported."""
    mid_block_only_cross_attention: Literal[False] | None = None
    """Not supported."""
    cross_attention_norm: None = None
    """Not supported."""
    addition_embed_type_num_heads: Size | None = 64
    """Heads of the attention pooling of `addition_embed_type: text`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_levels()
        self._check_channels()
        self._check_embeddings()
        return self

    def _check_levels(self) -> None:
        levels = len(self.block_out_channels)
        if levels == 0:
            raise ValueError("block_out_channels is empty; at least one level is needed")
        names = ["down_block_types", "up_block_types", "layers_per_block", "cross_attention_dim"]
        for name in [*names, "transformer_layers_per_block", "attention_head_dim", "only_cross_attention"]:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries, block_out_channels has {levels}")
        if self.only_cross_attention and any("Simple" in kind for kind in self.down_block_types + self.up_block_types):
            raise ValueError("only_cross_attention with SimpleCrossAttn blocks is not supported")

    def _check_channels(self) -> None:
        if self.block_out_channels[0] % 2:
            raise ValueError(
                f"block_out_channels[0]={self.block_out_channels[0]} is odd; the timestep embedding halves it"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups={self.norm_num_groups} does not divide {channels} of block_out_channels"
                )
        heads = self.per_level(self.attention_head_dim)
        for level in self._levels_with("Attn"):
            if self.block_out_channels[level] % heads[level]:
                raise ValueError(
                    f"attention_head_dim={heads[level]} does not divide "
                    f"block_out_channels[{level}]={self.block_out_channels[level]}"
                )

    def _check_embeddings(self) -> None:
        needed = {"class_embed_type: projection": self.class_embed_type == "projection"}
        needed["addition_embed_type: text_time"] = self.addition_embed_type == "text_time"
        for option, chosen in needed.items():
            if chosen and self.projection_class_embeddings_input_dim is None:
                raise ValueError(f"{option} needs projection_class_embeddings_input_dim, which is null")
        if self.addition_embed_type == "text_time" and self.addition_time_embed_dim is None:
            raise ValueError("addition_embed_type: text_time needs addition_time_embed_dim, which is null")
        if self.addition_time_embed_dim is not None and self.addition_time_embed_dim % 2:
            raise ValueError(f"addition_time_embed_dim={self.addition_time_embed_dim} is odd; sinusoids come in pairs")
        if self.addition_embed_type == "text_time" and (self.class_embed_type or self.num_class_embeds):
            raise ValueError("addition_embed_type: text_time with class_embed_type or num_class_embeds not supported")
        if (self.encoder_hid_dim is None) != (self.encoder_hid_dim_type is None):
            raise ValueError(f"encoder_hid_dim={self.encoder_hid_dim} and {self.encoder_hid_dim_type=}: give both")
        is_projected = self.encoder_hid_dim is not None or self.addition_embed_type == "text"
        if is_projected and not isinstance(self.cross_attention_dim, int):
            raise ValueError(
                "encoder_hid_dim and addition_embed_type: text need one cross_attention_dim for all levels"
            )
        heads = self.addition_embed_type_num_heads
        if self.addition_embed_type == "text" and (heads is None or self.text_width % heads):
            raise ValueError(
                f"addition_embed_type_num_heads={heads} does not divide the width {self.text_width} of the text states"
            )

    @property
    def pooled_fields(self) -> list[str]:
        """The fields that ask for `Condition.pooled`: classes, vectors, or pooled text with sizes."""
        names = ("num_class_embeds", "class_embed_type", "addition_embed_type")
        return [f"{name}={value}" for name in names if (value := getattr(self, name)) not in (None, "text")]

    @property
    def text_width(self) -> int:
        """Width of the text states, where it is the same for all levels."""
        width = self.encoder_hid_dim or self.cross_attention_dim
        assert isinstance(width, int)
        return width

    def is_to_text_alone(self, level: int) -> bool:
        """Whether the Transformers of a level attend to the text alone."""
        value = self.only_cross_attention
        return value if isinstance(value, bool) else value[level]

    def per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """One number per level, outermost first."""
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value

    def levels_with_text(self) -> list[int]:
        """Indices of the levels, outermost first, that see the text on the way down, up or in the middle."""
        return self._levels_with("CrossAttn")

    def _levels_with(self, part: str) -> list[int]:
        """Indices of the levels with a block whose kind has this part."""
        levels = len(self.block_out_channels)
        down = {i for i, kind in enumerate(self.down_block_types) if part in kind}
        up = {levels - 1 - i for i, kind in enumerate(self.up_block_types) if part in kind}
        return sorted(down | up | ({levels - 1} if part in (self.mid_block_type or "") else set()))
