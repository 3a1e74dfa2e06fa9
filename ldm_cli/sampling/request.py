"""Which pictures to generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ldm_cli.config import Config
from ldm_cli.sampling.config import SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor


class Blend(Config):
    """The other end of an interpolation: text states lie on the line between both prompts, noise on the arc between
    both seeds."""

    prompt: str
    """Prompt of the other picture."""
    seed: Annotated[int, Field(ge=0)]
    """Seed of the other picture."""
    weight: Annotated[float, Field(ge=0, le=1)]
    """How much of it there is."""


@dataclass(frozen=True)
class ImageRequest:
    """One picture to generate: it depends on these and the sampling configuration, on nothing else.

    Attributes:
        prompt, seed: what it shows, and which of all such pictures it is.
        blend: another prompt and seed that are mixed in; None: none.
    """

    prompt: str
    seed: int
    blend: Blend | None = None


Requests = Sequence[ImageRequest]


@dataclass(frozen=True)
class GeneratedImage:
    """A picture.

    Attributes:
        index: which of the requests it answers.
        pixels: uint8 [3, H, W], on the CPU.
    """

    index: int
    request: ImageRequest
    pixels: Tensor


def requests_for(prompts: Sequence[str], config: SamplingConfig) -> list[ImageRequest]:
    """`images_per_prompt` requests for each prompt in turn; image i of a prompt has the seed `seed + i`."""
    return [ImageRequest(p, config.seed + i) for p in prompts for i in range(config.images_per_prompt)]


def variations(prompt: str, config: SamplingConfig, amount: float) -> list[ImageRequest]:
    """Pictures that all resemble that of the first seed, which is the first of them.

    Args:
        prompt: of all.
        config: `images_per_prompt` and `seed`; image i leans towards the picture of `seed + i`.
        amount: 0 … 1: none to all of the way.
    """
    others = [Blend(prompt=prompt, seed=config.seed + i, weight=amount) for i in range(1, config.images_per_prompt)]
    return [ImageRequest(prompt, config.seed, blend) for blend in (None, *others)]


def walk(prompts: Sequence[str], seeds: Sequence[int], frames: int) -> list[ImageRequest]:
    """The way from each prompt to the next.

    Args:
        prompts: the stations, at least two.
        seeds: one for each.
        frames: pictures from one station to the next, the first included; the last station ends the walk.

    Raises:
        ValueError: fewer than two prompts.
    """
    if len(prompts) < 2:
        raise ValueError(f"walk: {len(prompts)} prompts, but a walk needs at least 2")
    found = []
    for (prompt, seed), (next_prompt, next_seed) in pairwise(zip(prompts, seeds, strict=True)):
        for k in range(frames):
            blend = Blend(prompt=next_prompt, seed=next_seed, weight=k / frames) if k else None
            found.append(ImageRequest(prompt, seed, blend))
    return [*found, ImageRequest(prompts[-1], seeds[-1])]
