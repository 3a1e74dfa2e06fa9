"""Settings of low-rank adapters that are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ldm_cli.config import Config

Rank = Annotated[int, Field(ge=1, le=1024)]
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ("*attn*",),
    "transformer": ("*attn*", "*.attentions.*", "*transformer_blocks.*", "*.mlp.*"),
    "all": ("*.*",),
}
"""Patterns of module paths by name. `transformer` is what kohya's scripts adapt."""
TEXT_TARGETS = ("transformer",)
"""Of text encoders. diffusers reads kohya's files only if they adapt more than queries and values."""


class LoRAConfig(Config):
    """Which modules get adapters, and of which rank."""

    rank: Rank = 8
    """Rank of the updates of linear layers and of 1×1 convolutions."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """An update is scaled by alpha / rank; null: by 1."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("transformer",)
    """Modules of the denoiser by patterns of their paths, such as `*.attn2.to_*`, or by name: `attention`;
    `transformer`: attention, feed-forward layers and the projections around them; `all`: every layer within blocks. A
    pattern that begins with `!` excepts what it matches; the last match wins."""
    conv_rank: Rank | None = None
    """Rank of the updates of larger convolutions among `targets`; null: they get none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that an input of an adapter is dropped in training."""
    dora: bool = False
    """Train the norms of the rows of a weight apart from their directions (Liu et al. 2024, arXiv:2402.09353)."""
    text_encoder: bool | Rank = False
    """Adapt attention and MLPs of the text encoders, too: with the rank of the denoiser, or with one of their own."""
    base_precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights that are adapted; bf16 halves their memory, and needs train.precision=bf16."""
