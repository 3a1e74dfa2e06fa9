"""What a recipe says about enlarging generated pictures and photos."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ldm_cli.config import Config, NamesModel
from ldm_cli.sampling.config import SamplingConfig


class UpscaleConfig(Config):
    """A model that enlarges what the first one has generated or, without a first one, a photo."""

    model: Annotated[str, NamesModel()]
    """An upscaler: a run of `train-unet` with `low_resolution`, or a published one."""
    noise_level: Annotated[int, Field(ge=0, le=999)] | None = None
    """Level of the noise on the small picture: more of it hides more of its flaws and lets the model make up more
    details; null: the model's own."""
    tile: Annotated[int, Field(ge=16)] | None = None
    """Side in pixels of the parts in which a large result is made; null: that of the model's training, at least 512.
    Of a photo `--tile` says it."""
    sampling: SamplingConfig = SamplingConfig()
    """After a first model: sampler, steps, guidance and negative prompt of the upscaler; of a photo `sampling` says
    them."""
