"""The typed recipe of `ldm cascade`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ldm_cli.config import Config
from ldm_cli.sampling.cascade_config import StageConfig


class CascadeStage(StageConfig):
    """One model of a cascade, and how it samples."""

    model: str
    """A pipeline, a run or a checkpoint: by its folder, or by its name on the hub."""


class CascadeRecipe(Config):
    """`ldm cascade`: models that work one after the other, as one."""

    command: Literal["cascade"]
    """Which command this recipe is for."""
    name: Annotated[str, Field(min_length=1)]
    """The folder is `runs/NAME/model`, unless `--out` says otherwise."""
    variant: Literal["fp16", "bf16"] | None = None
    """Precision of the weights of models that are named by hub name; null: full, where there is such."""
    stages: Annotated[tuple[CascadeStage, ...], Field(min_length=2)]
    """The first generates pictures; each other one enlarges them, and was trained with `low_resolution`."""
