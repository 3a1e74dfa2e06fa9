"""Settings of image prompts that are trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config, NamesModel

HEAD_WIDTH = 64
"""Width of a head of the resampler, as in all published files, which do not say it."""
_TOKENS = {"base": 4, "plus": 16}

Kind = Literal["base", "plus"]
Share = Annotated[float, Field(ge=0, le=1)]


class ImagePromptConfig(Config):
    """Training of an image prompt adapter, IP-Adapter (Ye et al. 2023, arXiv:2308.06721), on a frozen U-Net."""

    image_encoder: Annotated[str, NamesModel(("image_encoder",))]
    """The image tower that sees the pictures: a CLIPVisionModelWithProjection, or a CLIPModel of `train-clip`."""
    kind: Kind = "base"
    """`base` makes tokens of the embedding of a picture; `plus` of the states of its patches, which keep details."""
    num_tokens: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Tokens of a picture; null: 4, of `plus` 16. diffusers opens files of kind `base` with 4 tokens only."""
    width: Annotated[int, Field(ge=HEAD_WIDTH, le=2**16, multiple_of=HEAD_WIDTH)] = 768
    """`plus`: width of the resampler."""
    image_dropout: Share = 0.05
    """Chance that a picture is dropped while its caption is kept. `diffusion.caption_dropout` drops both."""
    text_dropout: Share = 0.05
    """Chance that a caption is dropped while its picture is kept."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (total := self.image_dropout + self.text_dropout) > 1:
            raise ValueError(f"image_dropout and text_dropout are {total:g} together, which is above 1")
        return self

    @property
    def resolved_num_tokens(self) -> int:
        """Tokens of a picture."""
        return self.num_tokens or _TOKENS[self.kind]
