"""The typed recipe of `ldm train-ar`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import NamesModel
from ldm_cli.core.models.llama_config import LlamaConfig
from ldm_cli.data.tokenizer_config import TokenizerConfig
from ldm_cli.recipe.train_recipe import SamplesConfig, StartedRecipe, known
from ldm_cli.sampling.config import SamplingConfig


class TokenSamplesConfig(SamplesConfig):
    """Pictures generated while an autoregressive model trains, always from the same prompts and seeds."""

    sampling: SamplingConfig = SamplingConfig(images_per_prompt=1)
    """Temperature, top-k, top-p, guidance."""


class TrainArRecipe(StartedRecipe):
    """`ldm train-ar`: a Transformer over the tokens of a caption and the codes of its picture."""

    command: Literal["train-ar"]
    """Which command this recipe is for."""
    vq: Annotated[str, NamesModel(("vq",))] = ""
    """The trained VQModel (`runs/…/model`). Empty: that of `start_from`."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Train a vocabulary from the captions, or load one, such as that of a CLIP."""
    text_length: Annotated[int, Field(ge=3, le=2**16)] = 77
    """Tokens of a caption, start and end included; shorter ones are padded, longer ones cut."""
    transformer: LlamaConfig | None = None
    """The model; fields as in transformers' LlamaConfig. null: that of `start_from`."""
    text_loss_weight: Annotated[float, Field(ge=0)] = 0.125
    """Weight of the captions' tokens beside the codes; those of a dropped caption do not count."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the samples that are trained with the empty caption, which guidance needs."""
    cache: str | None = None
    """Folder that `ldm precompute` wrote for this recipe, to read codes from; null computes them."""
    samples: TokenSamplesConfig = TokenSamplesConfig()
    """Pictures generated on the way."""

    @property
    def model(self) -> LlamaConfig:
        """The model's configuration, once `start_from` has been read."""
        return known(self.transformer, "transformer")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_start("transformer", "vq")
        self._expect_plain_loss()
        if self.data.aspect_buckets is not None:
            raise ValueError("data.aspect_buckets has no meaning here: all pictures have the same grid of codes")
        tied = self.transformer is not None and self.transformer.tie_word_embeddings
        if tied and self.train.strategy == "sharded":
            raise ValueError("train.strategy=sharded cannot share a weight: set transformer.tie_word_embeddings=false")
        return self
