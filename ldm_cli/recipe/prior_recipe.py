"""The typed recipe of `ldm train-prior`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import NamesModel
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.prior_transformer_config import PriorTransformerConfig
from ldm_cli.recipe.train_recipe import StartedRecipe, known
from ldm_cli.sampling.config import PriorConfig


class PriorDiffusionConfig(DiffusionConfig):
    """The process of embeddings: the fields of `diffusion` of `train-unet`, with other defaults."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """As in `train-unet`."""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "sample"
    """`sample`: the pipelines of a prior know no other."""


class TrainPriorRecipe(StartedRecipe):
    """`ldm train-prior`: unCLIP's prior, from a caption to the CLIP embedding of its picture."""

    command: Literal["train-prior"]
    """Which command this recipe is for."""
    clip: Annotated[str, NamesModel()] = ""
    """The trained CLIPModel (`runs/…/model`), whose image tower is a Vision Transformer."""
    cache: str | None = None
    """Folder that `ldm precompute` wrote for this recipe, to read embeddings and text states from; null computes
    them."""
    prior: PriorTransformerConfig | None = None
    """The model; fields as in diffusers' PriorTransformer. null: that of `start_from`."""
    diffusion: PriorDiffusionConfig = PriorDiffusionConfig()
    """Noise schedule, loss weights, caption dropout."""
    validation: PriorConfig = PriorConfig(scale=1.0)
    """How the embeddings are sampled that are compared with the true ones."""
    num_measured: Annotated[int, Field(ge=2)] = 50_000
    """Most training pictures whose embeddings give mean and deviation."""

    @property
    def model(self) -> PriorTransformerConfig:
        """The model's configuration, once `start_from` has been read."""
        return known(self.prior, "prior")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_start("prior")
        self._expect_plain_loss()
        if not self.clip:
            raise ValueError("clip: missing; name the CLIP whose embeddings are predicted")
        if self.diffusion.prediction_type != "sample" or self.diffusion.rescale_betas_zero_snr:
            raise ValueError("diffusion: a prior has prediction_type=sample and rescale_betas_zero_snr=false")
        if self.diffusion.encoder_dropout:
            raise ValueError("diffusion.encoder_dropout has no meaning here: use diffusion.caption_dropout")
        if self.data.aspect_buckets is not None:
            raise ValueError("data.aspect_buckets has no meaning here: CLIP sees squares")
        return self
