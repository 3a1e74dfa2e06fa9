"""The conditional U-Net denoiser of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.3)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.models.attention import Transformer2DModel
from ldm_cli.core.models.checkpointing import Checkpointable
from ldm_cli.core.models.layers import ResnetBlock2D, TimestepEmbedding, timestep_embedding
from ldm_cli.core.models.model_config import Depth, DiffusersConfig, One, Size, Zero
from ldm_cli.core.models.recompute import norm_silu_conv
from ldm_cli.core.models.unet_blocks import DownBlock, LevelSpec, MidBlock, UpBlock

DownBlockType = Literal["DownBlock2D", "CrossAttnDownBlock2D"]
UpBlockType = Literal["UpBlock2D", "CrossAttnUpBlock2D"]
MidBlockType = Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"]
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
    down_block_types: tuple[DownBlockType, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    """One per level, outermost first."""
    mid_block_type: MidBlockType | None = "UNetMidBlock2DCrossAttn"
    """Block at the lowest resolution: two residual blocks around attention; one residual block; or none."""
    up_block_types: tuple[UpBlockType, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    """One per level, innermost first."""
    only_cross_attention: Literal[False] = False
    """Not supported."""
    block_out_channels: tuple[Size, ...] = (320, 640, 1280, 1280)
    """Channels per level, outermost first; each level but the last halves height and width."""
    layers_per_block: DepthPerLevel = 2
    """Residual blocks per level on the way down, as one number or one per level; one more on the way up."""
    downsample_padding: Literal[1] = 1
    """Padding of the stride-2 convolutions."""
    mid_block_scale_factor: One = 1.0
    """Not supported."""
    dropout: Zero = 0.0
    """Not supported: it would draw from a global random generator, and runs could not be repeated exactly."""
    act_fn: Literal["silu"] = "silu"
    """Activation."""
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
    encoder_hid_dim: None = None
    """Not supported."""
    encoder_hid_dim_type: None = None
    """Not supported."""
    attention_head_dim: PerLevel = 8
    """*Number* of heads, as one number or one per level; the name is a slip of diffusers, kept for files."""
    num_attention_heads: None = None
    """Unused by diffusers, which refuses any value: say `attention_head_dim`."""
    dual_cross_attention: Literal[False] = False
    """Not supported."""
    use_linear_projection: bool = False
    """Linear layers rather than 1×1 convolutions around the Transformers (Stable Diffusion 2)."""
    class_embed_type: Literal["timestep", "identity", "projection"] | None = None
    """How class labels are embedded: null with `num_class_embeds` is a table."""
    addition_embed_type: Literal["text_time"] | None = None
    """`text_time`: pooled text and six sizes are added to the timestep embedding (SDXL)."""
    addition_time_embed_dim: Size | None = None
    """Width of each size's embedding, for `text_time`."""
    num_class_embeds: Size | None = None
    """Number of classes of the table."""
    upcast_attention: bool = False
    """For information: our attention accumulates its softmax in fp32 whatever the type."""
    resnet_time_scale_shift: Literal["default"] = "default"
    """Not supported."""
    resnet_skip_time_act: Literal[False] = False
    """Not supported."""
    resnet_out_scale_factor: One = 1.0
    """Not supported."""
    time_embedding_type: Literal["positional"] = "positional"
    """Sinusoidal timestep embedding."""
    time_embedding_dim: Size | None = None
    """Width of the timestep embedding; null: 4 × the outermost channels."""
    time_embedding_act_fn: None = None
    """Not supported."""
    timestep_post_act: None = None
    """Not supported."""
    time_cond_proj_dim: Size | None = None
    """Width of a vector that conditions the timestep embedding (guidance-distilled models)."""
    conv_in_kernel: Literal[3] = 3
    """Kernel size of the first convolution."""
    conv_out_kernel: Literal[3] = 3
    """Kernel size of the last convolution."""
    projection_class_embeddings_input_dim: Size | None = None
    """Input width for `class_embed_type: projection` and `addition_embed_type: text_time`."""
    attention_type: Literal["default"] = "default"
    """Not supported."""
    class_embeddings_concat: Literal[False] = False
    """Not supported."""
    mid_block_only_cross_attention: Literal[False] | None = None
    """Not supported."""
    cross_attention_norm: None = None
    """Not supported."""
    addition_embed_type_num_heads: Literal[64] = 64
    """Not supported."""

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
        for name in [*names, "transformer_layers_per_block", "attention_head_dim"]:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries, block_out_channels has {levels}")

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
        for level in self.levels_with_attention():
            if self.block_out_channels[level] % heads[level]:
                raise ValueError(
                    f"attention_head_dim={heads[level]} (a number of heads) does not divide "
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

    def per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """One number per level, outermost first."""
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value

    def levels_with_attention(self) -> list[int]:
        """Indices of the levels, outermost first, with a Transformer on the way down, up or in the middle."""
        levels = len(self.block_out_channels)
        down = {i for i, kind in enumerate(self.down_block_types) if kind == "CrossAttnDownBlock2D"}
        up = {levels - 1 - i for i, kind in enumerate(self.up_block_types) if kind == "CrossAttnUpBlock2D"}
        middle = {levels - 1} if self.mid_block_type == "UNetMidBlock2DCrossAttn" else set()
        return sorted(down | up | middle)


class UNet2DConditionModel(Checkpointable):
    """Predicts noise, velocity or image from a noisy latent, a timestep and text states.

    Initialised as in guided diffusion (Dhariwal & Nichol 2021) and latent diffusion: PyTorch's defaults, but
    zeros for the last layer of each residual branch, which starts as its shortcut, and of the network.
    """

    config_class = UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        self.embedding_dim = config.time_embedding_dim or 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], self.embedding_dim, config.time_cond_proj_dim)
        self.class_embedding = self._class_embedding()
        if config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None  # the Config's own check
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, self.embedding_dim)
        specs = [self._spec(level) for level in range(len(channels))]
        self.down_blocks, skip_channels = self._down_blocks(specs)
        self.mid_block: MidBlock | None = None
        if config.mid_block_type is not None:
            self.mid_block = MidBlock(specs[-1], attention=config.mid_block_type == "UNetMidBlock2DCrossAttn")
        self.up_blocks = self._up_blocks(specs, skip_channels)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self._zero_last_layers()

    def _class_embedding(self) -> nn.Module | None:
        config, dim = self.config, self.embedding_dim
        if config.class_embed_type == "timestep":
            return TimestepEmbedding(config.block_out_channels[0], dim)
        if config.class_embed_type == "projection":
            assert config.projection_class_embeddings_input_dim is not None  # the Config's own check
            return TimestepEmbedding(config.projection_class_embeddings_input_dim, dim)
        if config.class_embed_type == "identity":
            return nn.Identity()
        return None if config.num_class_embeds is None else nn.Embedding(config.num_class_embeds, dim)

    def _spec(self, level: int) -> LevelSpec:
        config = self.config
        return LevelSpec(
            channels=config.block_out_channels[level],
            embedding_dim=self.embedding_dim,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            num_heads=config.per_level(config.attention_head_dim)[level],
            context_dim=config.per_level(config.cross_attention_dim)[level],
            num_transformer_layers=config.per_level(config.transformer_layers_per_block)[level],
            linear_projection=config.use_linear_projection,
        )

    def _down_blocks(self, specs: list[LevelSpec]) -> tuple[nn.ModuleList, list[int]]:
        """The way down, and the channels of every result it keeps, in order."""
        blocks = nn.ModuleList()
        channels = specs[0].channels
        skip_channels = [channels]
        num_layers = self.config.per_level(self.config.layers_per_block)
        for level, (spec, kind) in enumerate(zip(specs, self.config.down_block_types, strict=True)):
            downsample = level < len(specs) - 1
            attention = kind == "CrossAttnDownBlock2D"
            blocks.append(DownBlock(spec, channels, num_layers[level], attention=attention, downsample=downsample))
            channels = spec.channels
            skip_channels += [channels] * (num_layers[level] + downsample)
        return blocks, skip_channels

    def _up_blocks(self, specs: list[LevelSpec], skip_channels: list[int]) -> nn.ModuleList:
        blocks = nn.ModuleList()
        channels = specs[-1].channels
        num_layers = self.config.per_level(self.config.layers_per_block)
        for level, kind in zip(reversed(range(len(specs))), self.config.up_block_types, strict=True):
            skips = [skip_channels.pop() for _ in range(num_layers[level] + 1)]
            attention = kind == "CrossAttnUpBlock2D"
            blocks.append(UpBlock(specs[level], channels, skips, attention=attention, upsample=level > 0))
            channels = specs[level].channels
        return blocks

    def _zero_last_layers(self) -> None:
        last: list[nn.Conv2d | nn.Linear] = [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock2D)]
        last += [m.proj_out for m in self.modules() if isinstance(m, Transformer2DModel)]
        for layer in [*last, self.conv_out]:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """The prediction for a noisy latent.

        Args:
            sample: [B, C, h, w]; any h and w.
            timestep: number, [] or [B]; in units of training steps, not necessarily whole.
            encoder_hidden_states: text states [B, M, D]; may be left out by a network without attention.
            class_labels: [B], or [B, n] for `class_embed_type: projection`, or [B, E] for `identity`.
            text_embeds, time_ids: [B, P] and [B, 6], for `addition_embed_type: text_time`.
            timestep_cond: [B, time_cond_proj_dim].

        Returns:
            [B, C', h, w].

        Raises:
            ValueError: a condition that the network needs is missing, or one it has no use for is given.
        """
        embedding = self._embedding(sample, timestep, class_labels, text_embeds, time_ids, timestep_cond)
        if encoder_hidden_states is None and self.config.levels_with_attention():
            raise ValueError("encoder_hidden_states is None, but the network attends to text")
        hidden = self.conv_in(sample)
        skips = [hidden]
        for block in self.down_blocks:
            skips += block(skips[-1], embedding, encoder_hidden_states)
        hidden = skips[-1]
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, embedding, encoder_hidden_states)
        for block in self.up_blocks:
            hidden = block(hidden, embedding, encoder_hidden_states, skips)
        prediction: Tensor = norm_silu_conv(hidden, self.conv_norm_out, self.conv_out)
        return prediction

    def _embedding(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        timestep_cond: Tensor | None,
    ) -> Tensor:
        """silu of the sum of all embedded scalars and vectors: [B, E]."""
        self._check_conditions(class_labels, text_embeds, time_ids, timestep_cond)
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding: Tensor = self.time_embedding(
            self._sinusoids(timesteps, self.config.block_out_channels[0], sample), timestep_cond
        )
        if self.class_embedding is not None and class_labels is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self._sinusoids(class_labels, self.config.block_out_channels[0], sample)
            embedding = embedding + self.class_embedding(class_labels)
        if text_embeds is not None and time_ids is not None:
            embedding = embedding + self._text_time(text_embeds, time_ids, sample)
        return F.silu(embedding)

    def _check_conditions(
        self,
        class_labels: Tensor | None,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        timestep_cond: Tensor | None,
    ) -> None:
        config = self.config
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                f"class_labels {'missing' if class_labels is None else 'given'}, but the network has "
                f"class_embed_type={config.class_embed_type} and num_class_embeds={config.num_class_embeds}"
            )
        if config.addition_embed_type == "text_time" and (text_embeds is None or time_ids is None):
            raise ValueError("text_embeds and time_ids are needed for addition_embed_type: text_time")
        if config.addition_embed_type is None and not (text_embeds is None and time_ids is None):
            raise ValueError("text_embeds or time_ids given, but the network has addition_embed_type=None")
        if timestep_cond is not None and config.time_cond_proj_dim is None:
            raise ValueError("timestep_cond given, but the network has time_cond_proj_dim=None")

    def _text_time(self, text_embeds: Tensor, time_ids: Tensor, sample: Tensor) -> Tensor:
        """Pooled text beside the sinusoids of each size (Podell et al. 2023, arXiv:2307.01952, 2.2)."""
        assert self.config.addition_time_embed_dim is not None  # the Config's own check
        sizes = self._sinusoids(time_ids.flatten(), self.config.addition_time_embed_dim, sample)
        result: Tensor = self.add_embedding(torch.cat((text_embeds, sizes.reshape(len(sample), -1)), dim=-1))
        return result

    def _sinusoids(self, values: Tensor, dim: int, sample: Tensor) -> Tensor:
        config = self.config
        embedding = timestep_embedding(
            values, dim, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        return embedding.to(sample.dtype)
