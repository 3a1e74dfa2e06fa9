"""The picture that editing begins with: read, extended, padded to multiples of the codec's factor; in latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.decode import decode_rgb, from_pillow
from ldm_cli.errors import DataError, UsageError
from ldm_cli.inputs import MOST_PICTURE_BYTES, read_input
from ldm_cli.sampling.edit_config import EditConfig

_MOST_PIXELS = 2**27
_BLACK = (0, 0, 0)
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class EditInput:
    """A picture to work on.

    Attributes:
        pixels: uint8 [3, H, W]; H and W are multiples of the codec's factor.
        mask: bool [H, W], true where the picture changes; None: everywhere.
        size: height and width of the picture; the rest is padding to the right and below.
        style: uint8 [3, H', W'], a picture that lends its style.
        style_strength: 0 … 1.
        strength: share of the steps that are taken.
    """

    pixels: Tensor
    mask: Tensor | None
    size: tuple[int, int]
    strength: float
    style: Tensor | None = None
    style_strength: float = 1.0

    def pasted(self, generated: Tensor) -> Tensor:
        """`generated` uint8 [3, H, W] inside of the mask, the picture itself outside of it; padding cut off."""
        if self.mask is not None:
            generated = torch.where(self.mask, generated, self.pixels)
        return generated[:, : self.size[0], : self.size[1]]


@dataclass(frozen=True)
class LatentEditInput:
    """A picture to work on, in latents.

    Attributes:
        latents: float32 [1, C, h, w], of the picture, in its style.
        mask: float32 [1, 1, h, w], 1 where a pixel changes, else 0; None: everywhere.
        masked_latents: of the picture with grey under the mask, [1, C, h, w]; None without a mask.
        strength: share of the steps that are taken.
    """

    latents: Tensor
    mask: Tensor | None
    masked_latents: Tensor | None
    strength: float


def open_edit_input(edit: EditConfig, factor: int, size: tuple[int, int] | None) -> EditInput:
    """Read the pictures that a configuration names.

    Args:
        edit: names at least an image.
        factor: of the codec.
        size: height and width to fit the picture and its mask into (covering it, centred), before it is extended;
            None: as they are.

    Raises:
        InputNotFoundError, DataError: a picture cannot be read.
        UsageError: picture and mask differ in size, or the mask is empty.
    """
    assert edit.image is not None
    image = open_picture(edit.image, "--init", size)
    mask = torch.zeros(image.shape[1:], dtype=torch.bool)
    if edit.mask is not None:
        given = open_picture(edit.mask, "--mask", size)
        if given.shape != image.shape:
            raise UsageError(
                f"mask '{edit.mask}' is {given.shape[2]}x{given.shape[1]} px",
                f"its picture is {image.shape[2]}x{image.shape[1]}",
                "make them the same size",
            )
        # ITU-R 601 luma, as Pillow's mode L; the middle and above is white.
        mask = (given.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0) >= 127.5
    left, top, right, bottom = edit.extend
    image, mask = _extended(image, (left, right, top, bottom)), F.pad(mask, (left, right, top, bottom), value=True)
    if edit.is_masked and not bool(mask.any()):
        raise UsageError(f"mask '{edit.mask}' is all black", "nothing would change", "paint white what should change")
    height, width = image.shape[1:]
    padding = (0, -width % factor, 0, -height % factor)
    return EditInput(
        pixels=_extended(image, padding),
        mask=F.pad(mask, padding, value=False) if edit.is_masked else None,
        size=(height, width),
        strength=edit.resolved_strength,
        style=None if edit.style is None else _with_factor(open_picture(edit.style, "--style", None), factor),
        style_strength=edit.style_strength,
    )


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """Pixels bool [H, W] → latents float32 [1, 1, h, w]: 1 where any of its pixels changes."""
    return F.max_pool2d(mask[None, None].float(), factor)


def adain(content: Tensor, style: Tensor, amount: float) -> Tensor:
    """Content with the mean and deviation, channel by channel, of a style (Huang & Belongie 2017, eq. 8,
    arXiv:1703.06868).

    Args:
        content, style: [1, C, h, w]; heights and widths may differ.
        amount: 0 … 1, from the content's own statistics to the style's.
    """
    mean, deviation = content.mean((2, 3), keepdim=True), content.std((2, 3), keepdim=True)
    style_mean, style_deviation = style.mean((2, 3), keepdim=True), style.std((2, 3), keepdim=True)
    styled = (content - mean) / (deviation + 1e-5) * style_deviation + style_mean
    return torch.lerp(content, styled, amount)


def open_picture(name: str, option: str, size: tuple[int, int] | None = None) -> Tensor:
    """A picture, uint8 [3, H, W].

    Args:
        name: of its file.
        option: that names it, for messages.
        size: height and width to fit it into, covering it; None: as it is.

    Raises:
        InputNotFoundError, DataError: it cannot be read.
    """
    try:
        data = read_input(Path(name), MOST_PICTURE_BYTES, remedy=f"check {option}")
        image = decode_rgb(data, _BLACK if option == "--mask" else _WHITE, _MOST_PIXELS).image
    except BadSampleError as error:
        raise DataError(f"cannot read '{name}'", str(error), f"check {option}") from error
    if size is not None and image.size != (size[1], size[0]):
        resampling = Image.Resampling.NEAREST if option == "--mask" else Image.Resampling.BICUBIC
        image = ImageOps.fit(image, (size[1], size[0]), resampling)
    return from_pillow(image)[0].contiguous()


def _extended(image: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """The edge pixels repeated outwards: left, right, top, bottom."""
    return F.pad(image[None].float(), padding, mode="replicate")[0].to(torch.uint8)


def _with_factor(image: Tensor, factor: int) -> Tensor:
    return _extended(image, (0, -image.shape[2] % factor, 0, -image.shape[1] % factor))
