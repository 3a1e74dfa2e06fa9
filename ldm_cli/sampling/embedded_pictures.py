"""Given pictures as CLIP embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_cli.errors import UsageError
from ldm_cli.families.family import ImageGenerator
from ldm_cli.families.unclip import UnCLIP
from ldm_cli.sampling.edit_input import open_picture


@torch.inference_mode()
def embedded_pictures(family: ImageGenerator, names: Sequence[str]) -> Tensor:
    """The embeddings of picture files, [1, K, E], on the device.

    Raises:
        InputNotFoundError, DataError: a picture cannot be read.
        UsageError: the model does not embed pictures.
    """
    if not isinstance(family, UnCLIP) or family.image_encoder is None:
        cause = "it has no image encoder" if isinstance(family, UnCLIP) else "only unCLIP models do"
        raise UsageError("this model does not make variations of pictures", cause, "leave --image out")
    pictures = [open_picture(name, "--image", None) for name in names]
    return torch.cat([family.image_encoder(picture[None].to(family.device)).float() for picture in pictures])[None]
