"""What a job may want beside prompts and a sampler: a picture to work on, windows, weighted words, previews."""

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
class SampleOptions:
    """Options of a call of `Pipeline.generate`.

    Attributes:
        edit_input: a picture to work on; None: from nothing.
        window: side, in latents, of the windows in which networks see larger pictures; None: they see all.
        weighted: whether `(word:1.3)` in a prompt is a weight.
        preview_every: calls of the predictor between previews; 0: none.
        on_preview: receives them.
        preview_codec: decodes them; None: that of the family.
        on_nonfinite: is called for each picture that is not finite; by default it raises the error.
    """

    edit_input: EditInput | None = None
    window: int | None = None
    weighted: bool = False
    preview_every: int = 0
    on_preview: OnPreview | None = None
    preview_codec: Codec | None = None
    on_nonfinite: OnNonfinite = _raise


PLAIN = SampleOptions()
