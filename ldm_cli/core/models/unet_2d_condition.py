"""The conditional U-Net denoiser of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.models.attention import Transformer2DModel
from ldm_cli.core.models.checkpointing import Checkpointable
from ldm_cli.core.models.layers import ResnetBlock2D, TimestepEmbedding, timestep_embedding
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
            timestep: number, [] or [1], the same for all rows and embedded once, or [B]; in units of training steps,
                not necessarily whole.
            encoder_hidden_states: text states [B, M, D]; None only for a network without attention.
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
        prediction: Tensor = self.conv_out(F.silu(self.conv_norm_out(hidden)))
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
        """silu of the sum of all embedded scalars and vectors: [B, E], or [1, E] if all rows have the same."""
        self._check_conditions(class_labels, text_embeds, time_ids, timestep_cond)
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1)
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
