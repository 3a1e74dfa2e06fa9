"""What a recipe says about working on a given picture."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config

Pixels = Annotated[int, Field(ge=0)]


class EditConfig(Config):
    """A picture to begin with, where to change it and by how much; every field is also an option of `ldm sample`."""

    image: str | None = None
    """The picture to work on: its content (img2img), its surroundings (`extend`), or a part of it (`mask`)."""
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the steps that are taken on it (Meng et al. 2022): 0 gives it back as the autoencoder sees it, 1
    forgets it where there is no mask; null: 1 with a mask or `extend`, else 0.8."""
    mask: str | None = None
    """Picture of the same size: parts lighter than middle grey are generated anew, all others stay as they are."""
    extend: tuple[Pixels, Pixels, Pixels, Pixels] = (0, 0, 0, 0)
    """Pixels to add beyond the left, top, right and bottom edge."""
    style: str | None = None
    """A picture whose colours and textures the content takes over, as statistics of its latents (Huang &
    Belongie 2017)."""
    style_strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How much of the style: 0 none, 1 all of its statistics."""

    embedded: Annotated[tuple[str, ...], Field(max_length=2)] = ()
    """unCLIP: pictures whose CLIP embeddings take the place of the prior's: one to vary, or two to go between."""
    from_text: str | None = None
    """unCLIP: what is to change in the picture, in words: it becomes `to_text`."""
    to_text: str | None = None
    """unCLIP: what it is to become."""
    amount: Annotated[float, Field(ge=0, le=1)] = 0.35
    """unCLIP: how far the embedding moves along the difference of both texts, from 0, not at all, to 1, until it points
    there; the paper goes from 0.25 to 0.5."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.from_text is None) != (self.to_text is None):
            raise ValueError("from_text and to_text: one is given without the other")
        if self.from_text is not None and not self.embedded:
            raise ValueError("from_text and to_text without a picture whose embedding they change")
        if self.image is None:
            given = [name for name in ("strength", "mask", "style") if getattr(self, name) is not None]
            given += ["extend"] if any(self.extend) else []
            if given:
                raise ValueError(f"{', '.join(given)} without an image to work on")
        return self

    @property
    def is_given(self) -> bool:
        """Whether there is any picture to work on."""
        return self.image is not None or bool(self.embedded)

    @property
    def is_masked(self) -> bool:
        """Whether a part of the picture stays."""
        return self.mask is not None or any(self.extend)

    @property
    def resolved_strength(self) -> float:
        """The strength, by default that of the kind of work."""
        if self.strength is not None:
            return self.strength
        return 1.0 if self.is_masked else 0.8
