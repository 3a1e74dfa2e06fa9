"""Settings of a transformer's training that concern its patches."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config, NamesModel


class PatchTrainingConfig(Config):
    """Patches that training leaves out, or compares with the features of a CLIP; both are off by default."""

    left_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the patches that most blocks do not see, and that have no loss: steps are cheaper (Sehwag et al. 2024,
    arXiv:2407.15811, "deferred masking"; there 0.75)."""
    mixer_blocks: Annotated[int, Field(ge=0)] = 1
    """`left_out`: blocks at the beginning that see all patches, so that those which stay know of the others."""
    whole_from: Annotated[float, Field(ge=0, le=1)] = 0.8
    """`left_out`: share of the steps after which no patch is left out any more, as sampling leaves none out."""
    clip: Annotated[str | None, NamesModel()] = None
    """A CLIPModel with a Vision Transformer: image tokens learn to predict the features of its patches (REPA, Yu et al.
    2024, arXiv:2410.06940). Its images are read, so that there can be no cache. null: off."""
    aligned_block: Annotated[int, Field(ge=1)] = 2
    """`clip`: the tokens after this many blocks are compared, through a projection that is not exported."""
    alignment_weight: Annotated[float, Field(gt=0)] = 0.5
    """`clip`: λ, weight of the mean of 1 − cosine beside the denoising loss."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.left_out and self.clip is not None:
            raise ValueError("left_out and clip: one of them, for the features are those of all patches")
        return self
