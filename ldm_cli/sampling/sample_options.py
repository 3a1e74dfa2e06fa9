"""What a job may want beside prompts and a sampler: a picture to work on, image prompts, windows, previews."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm_cli.core.codec import Codec
from ldm_cli.errors import DivergedError
from ldm_cli.sampling.edit_input import EditInput

OnPreview = Callable[[Tensor], None]
"""Receives a group of pictures in their present state: uint8 [N, 3, H, W]."""
OnNonfinite = Callable[[DivergedError], None]
"""Receives the error that names a picture with values that are not finite, in place of the picture."""


def _raise(error: DivergedError) -> None:
    raise error


@dataclass(frozen=True)
class TextDifference:
    """unCLIP: what changes an image embedding, said by two texts.

    Attributes:
        source, target: the texts; the embedding moves along target − source.
        amount: share of the arc towards that direction, 0 … 1.
    """

    source: str
    target: str
    amount: float


@dataclass(frozen=True)
class ImageTokens:
    """Image prompts, for a denoiser with adapters for them: see `core/image_prompt.py`.

    Attributes:
        given: tokens of the pictures, side by side, [1, N, D].
        absent: what stands for no picture, of that shape: guidance steers away from it.
    """

    given: Tensor
    absent: Tensor


@dataclass(frozen=True)
class SampleOptions:
    """Options of a call of `Pipeline.generate`.

    Attributes:
        edit_input: a picture to work on; None: from nothing.
        image_tokens: of image prompts; None: there are none.
        window: side, in latents, of the windows in which networks see larger pictures; None: they see all.
        weighted: whether `(word:1.3)` in a prompt is a weight.
        preview_every: calls of the predictor between previews; 0: none.
        on_preview: receives them.
        preview_codec: decodes them; None: that of the family.
        image_embeds: unCLIP: embeddings [N, K, E] of given pictures in place of the prior's, for each of N requests, or
            [1, K, E] for all: of one picture, or of two to go between by the weight of a request's blend.
        text_difference: unCLIP: how all embeddings are changed; None: not at all.
        on_nonfinite: is called for each picture that is not finite; by default it raises the error.
    """

    edit_input: EditInput | None = None
    image_tokens: ImageTokens | None = None
    window: int | None = None
    weighted: bool = False
    preview_every: int = 0
    on_preview: OnPreview | None = None
    preview_codec: Codec | None = None
    image_embeds: Tensor | None = None
    text_difference: TextDifference | None = None
    on_nonfinite: OnNonfinite = _raise


PLAIN = SampleOptions()
