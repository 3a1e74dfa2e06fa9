"""The fields that the recipes of several trainers have."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, TypeVar

from pydantic import Field

from ldm_cli.config import Config, NamesModel
from ldm_cli.data.config import DataConfig
from ldm_cli.recipe.sample_recipe import Variant
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.training.config import TrainConfig

ConfigT = TypeVar("ConfigT", bound=Config)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class TrainRecipe(Config):
    """The fields that every trainer's recipe has."""

    command: str
    """Which command this recipe is for."""
    name: Name
    """Name of the run, whose folder is `runs/NAME`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""
    data: DataConfig
    """Shards and preprocessing."""
    train: TrainConfig
    """Optimization."""
    variant: Variant = None
    """Precision of the weights of models that are named by hub name; null: full, where there is such."""

    def _expect_plain_loss(self) -> None:
        """Make sure that the data asks for nothing that only the loss of a denoiser has."""
        if given := [name for name in ("loss_weights", "mask") if getattr(self.data, name) is not None]:
            raise ValueError(f"data.{given[0]} has no meaning here: it changes the loss of train-unet")


class StartedRecipe(TrainRecipe):
    """A recipe whose training may begin at trained weights."""

    start_from: Annotated[str | None, NamesModel()] = None
    """Begin at these trained weights: a model of this kind as we, diffusers or transformers write it, a run or a
    checkpoint. null: fresh weights."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are in `start_from`, by patterns of their names such as `encoder.*`. A pattern that
    begins with `!` excepts what it matches; the last match wins."""

    def _check_start(self, *sections: str, instead: Mapping[str, str] = MappingProxyType({})) -> None:
        """Make sure that `start_from` or the recipe gives each section; `instead`: fields that would do as well."""
        missing = [name for name in sections if not getattr(self, name)]
        if self.start_from is None and missing:
            what = f"{' and '.join(missing)}: missing, and there is no start_from to take it from"
            others = [f", and no {instead[name]} in place of {name}" for name in missing if name in instead]
            raise ValueError("".join([what, *others]))
        if self.start_from is None and self.freeze:
            raise ValueError("freeze needs start_from: fresh weights would stay random")


class SamplesConfig(Config):
    """Pictures generated while a denoiser trains, always from the same prompts and seeds."""

    prompts: tuple[str, ...] = ()
    """Fixed prompts; empty: captions of the first held-out samples."""
    num_prompts: Annotated[int, Field(ge=1, le=64)] = 8
    """How many captions to take when `prompts` is empty."""
    sampling: SamplingConfig = SamplingConfig(steps=20, images_per_prompt=1)
    """Sampler, steps, guidance, size."""


def known(config: ConfigT | None, section: str) -> ConfigT:
    """A section of a recipe, once `start_from` has been read; raises ValueError where it is None."""
    if config is None:
        raise ValueError(f"{section} is None: read start_from first")
    return config
