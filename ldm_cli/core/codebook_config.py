"""How a codebook is learnt, without torch: recipes are checked by it."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config
from ldm_cli.core.vae_loss_config import Weight


class CodebookConfig(Config):
    """How the codes of a VQ model are found, and how closely the encoder keeps to them."""

    kind: Literal["ema", "gradient", "fsq"] = "ema"
    """`ema`: each code is the running mean of the vectors nearest to it (van den Oord et al. 2017, appendix A.1).
    `gradient`: a term of the loss pulls codes towards their vectors. `fsq`: the codes are fixed, the grid of finite
    scalar quantization (Mentzer et al. 2023)."""
    commitment_weight: Weight = 0.25
    """Weight of the term that pulls the encoder's vectors towards their codes: β of van den Oord et al. 2017, eq. 3."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """`ema`: decay of the running means, per step."""
    restart_below: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """`ema`: a code whose running share of all vectors falls below this fraction of an equal share starts again at a
    vector of the batch that its code is far from; 0: never."""
    levels: tuple[Annotated[int, Field(ge=2, le=2**10)], ...] = ()
    """`fsq`: numbers of values per channel; their product is the number of codes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "fsq") != bool(self.levels):
            raise ValueError("kind=fsq needs levels, and no other kind has them")
        return self

    def expect_fitting(self, num_codes: int, channels: int) -> None:
        """Raises ValueError if the levels are not those of a codebook of that many codes and channels."""
        if self.levels and (math.prod(self.levels), len(self.levels)) != (num_codes, channels):
            found = f"{math.prod(self.levels)} codes of {len(self.levels)} channels"
            raise ValueError(f"codebook.levels={list(self.levels)} are {found}, vq has {num_codes} of {channels}")
