"""The conditional U-Net denoiser of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.3)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.attention import AttentionBlock2D, TextPooling, Transformer2DModel
from ldm_cli.core.models.checkpointing import Checkpointable
from ldm_cli.core.models.layers import ACTIVATIONS, ResnetBlock2D, TimestepEmbedding, timestep_embedding
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.models.unet_blocks import DownBlock, LevelSpec, MidBlock, UpBlock


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
        self.activation = ACTIVATIONS[config.act_fn]
        embed = (self.embedding_dim, config.time_cond_proj_dim, config.act_fn)
        self.time_embedding = TimestepEmbedding(channels[0], *embed)
        self.encoder_hid_proj: nn.Linear | None = None
        if config.encoder_hid_dim is not None:
            assert isinstance(config.cross_attention_dim, int)  # the Config's own check
            self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        self.class_embedding = self._class_embedding()
        self.add_embedding: TimestepEmbedding | TextPooling | None = None
        if config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None  # the Config's own check
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, self.embedding_dim)
        elif config.addition_embed_type == "text":
            assert config.addition_embed_type_num_heads is not None  # the Config's own check
            heads = config.addition_embed_type_num_heads
            self.add_embedding = TextPooling(config.text_width, self.embedding_dim, heads)
        specs = [self._spec(level) for level in range(len(channels))]
        self.down_blocks, skip_channels = self._down_blocks(specs)
        self.mid_block: MidBlock | None = None
        if config.mid_block_type is not None:
            self.mid_block = MidBlock(replace(specs[-1], to_text_alone=False), config.mid_block_type)
        self.up_blocks = self._up_blocks(specs, skip_channels)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self._zero_last_layers()

    def _class_embedding(self) -> nn.Module | None:
        config, dim = self.config, self.embedding_dim
        if config.class_embed_type == "timestep":
            return TimestepEmbedding(config.block_out_channels[0], dim, activation=config.act_fn)
        if config.class_embed_type == "projection":
            assert config.projection_class_embeddings_input_dim is not None  # the Config's own check
            return TimestepEmbedding(config.projection_class_embeddings_input_dim, dim, activation=config.act_fn)
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
            attention_head_dim=config.per_level(config.attention_head_dim)[level],
            context_dim=config.per_level(config.cross_attention_dim)[level],
            num_transformer_layers=config.per_level(config.transformer_layers_per_block)[level],
            linear_projection=config.use_linear_projection,
            activation=config.act_fn,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            to_text_alone=config.is_to_text_alone(level),
        )

    def _down_blocks(self, specs: list[LevelSpec]) -> tuple[nn.ModuleList, list[int]]:
        """The way down, and the channels of every result it keeps, in order."""
        blocks = nn.ModuleList()
        channels = specs[0].channels
        skip_channels = [channels]
        num_layers = self.config.per_level(self.config.layers_per_block)
        for level, (spec, kind) in enumerate(zip(specs, self.config.down_block_types, strict=True)):
            downsample = level < len(specs) - 1
            blocks.append(DownBlock(spec, kind, channels, num_layers[level], downsample=downsample))
            channels = spec.channels
            skip_channels += [channels] * (num_layers[level] + downsample)
        return blocks, skip_channels

    def _up_blocks(self, specs: list[LevelSpec], skip_channels: list[int]) -> nn.ModuleList:
        blocks = nn.ModuleList()
        channels = specs[-1].channels
        num_layers = self.config.per_level(self.config.layers_per_block)
        for level, kind in zip(reversed(range(len(specs))), self.config.up_block_types, strict=True):
            skips = [skip_channels.pop() for _ in range(num_layers[level] + 1)]
            blocks.append(UpBlock(specs[level], kind, channels, skips, upsample=level > 0))
            channels = specs[level].channels
        return blocks

    def _zero_last_layers(self) -> None:
        last: list[nn.Conv2d | nn.Linear] = [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock2D)]
        for module in self.modules():
            if isinstance(module, Transformer2DModel):
                last.append(module.proj_out)
            elif isinstance(module, AttentionBlock2D) and isinstance(projection := module.to_out[0], nn.Linear):
                last.append(projection)
        for layer in [*last, self.conv_out]:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction for a noisy latent: a `Denoiser`.

        Args:
            x: [B, C, h, w]; any h and w.
            t: float [B] or, the same for all rows, [1]; in units of training steps, not necessarily whole.
            condition: `tokens` [B, M, D] for cross-attention. `pooled`: class indices int64 [B]; or what
                `class_embed_type` embeds: numbers [B], vectors [B, P] (`projection`) or [B, E] (`identity`); or, for
                `addition_embed_type: text_time`, pooled text followed by sizes in pixels, [B, P + S]. `guidance`
                [B, time_cond_proj_dim]. `concat` [B, C', h, w] where `in_channels` is C + C'.

        Returns:
            [B, out_channels, h, w].

        Raises:
            ValueError: a condition that the network needs is missing, or one it has no use for is given.
        """
        self._check_conditions(x, condition)
        embedding, tokens = self._embedding(x, t, condition), condition.tokens
        if self.encoder_hid_proj is not None and tokens is not None:
            tokens = self.encoder_hid_proj(tokens)
        hidden = self.conv_in(x if condition.concat is None else torch.cat([x, condition.concat], dim=1))
        skips = [hidden]
        for block in self.down_blocks:
            skips += block(skips[-1], embedding, tokens)
        hidden = skips[-1]
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, embedding, tokens)
        for block in self.up_blocks:
            hidden = block(hidden, embedding, tokens, skips)
        prediction: Tensor = self.conv_out(self.activation(self.conv_norm_out(hidden)))
        return prediction

    def _check_conditions(self, x: Tensor, condition: Condition) -> None:
        config = self.config
        if (condition.pooled is None) == bool(config.pooled_fields):
            raise ValueError(
                f"condition.pooled is {'missing' if condition.pooled is None else 'given'}, but the network has "
                f"{', '.join(config.pooled_fields) or 'no field that asks for it'}"
            )
        if condition.tokens is None and (config.levels_with_text() or isinstance(self.add_embedding, TextPooling)):
            raise ValueError("condition.tokens is missing, but the network attends to text")
        if condition.guidance is not None and config.time_cond_proj_dim is None:
            raise ValueError("condition.guidance is given, but the network has time_cond_proj_dim=None")
        if condition.image_tokens is not None:
            raise ValueError("condition.image_tokens is given, but the network has no image adapter")
        channels = x.shape[1] + (0 if condition.concat is None else condition.concat.shape[1])
        if channels != config.in_channels:
            raise ValueError(f"{channels} channels in x and condition.concat, but in_channels={config.in_channels}")

    def _embedding(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The activated sum of all embedded numbers and vectors: [B, E], or [1, E] if all rows have the same."""
        channels = self.config.block_out_channels[0]
        embedding: Tensor = self.time_embedding(self._sinusoids(t, channels, x), condition.guidance)
        if self.class_embedding is not None and (labels := condition.pooled) is not None:
            if self.config.class_embed_type == "timestep":
                labels = self._sinusoids(labels, channels, x)
            elif self.config.class_embed_type is not None:
                labels = labels.to(x.dtype)
            embedding = embedding + self.class_embedding(labels)
        elif condition.pooled is not None:
            embedding = embedding + self._text_time(condition.pooled, x)
        if isinstance(self.add_embedding, TextPooling):
            embedding = embedding + self.add_embedding(condition.tokens)
        return self.activation(embedding)

    def _text_time(self, pooled: Tensor, x: Tensor) -> Tensor:
        """Pooled text beside the sinusoids of each size (Podell et al. 2023, arXiv:2307.01952, 2.2).

        P + S numbers become P + S · d, which the configuration states; so S follows.
        """
        assert isinstance(self.add_embedding, TimestepEmbedding)
        width, dim = self.add_embedding.linear_1.in_features, self.config.addition_time_embed_dim
        assert dim is not None  # the Config's own check
        num_sizes, rest = divmod(width - pooled.shape[1], dim - 1)
        if rest or num_sizes < 0:
            raise ValueError(
                f"condition.pooled has {pooled.shape[1]} numbers, but addition_time_embed_dim={dim} and "
                f"projection_class_embeddings_input_dim={width} leave no whole number of sizes among them"
            )
        text, sizes = pooled.tensor_split([pooled.shape[1] - num_sizes], dim=1)
        embedded = self._sinusoids(sizes.flatten(), dim, x).reshape(len(sizes), -1)
        result: Tensor = self.add_embedding(torch.cat((text.to(x.dtype), embedded), dim=1))
        return result

    def _sinusoids(self, values: Tensor, dim: int, like: Tensor) -> Tensor:
        """Numbers [N] → [N, dim], of the type of `like`."""
        config = self.config
        embedding = timestep_embedding(
            values, dim, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        return embedding.to(like.dtype)
