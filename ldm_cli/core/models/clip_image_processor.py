"""How a CLIP wants its images: the preprocessor_config.json of transformers' CLIPImageProcessor, in torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.nn import functional as F

from ldm_cli.config import Config
from ldm_cli.core.models.model_config import Size

# Per-channel mean and deviation of OpenAI's training images, on a scale of [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
# Pillow's numbers of the filters that torch has.
_FILTERS = {2: "bilinear", 3: "bicubic"}
# Keys of the file that change nothing for a batch of RGB images.
_BOOKKEEPING = frozenset(
    {
        *("data_format", "default_to_square", "device", "disable_grouping", "do_convert_rgb"),
        *("feature_extractor_type", "image_processor_type", "image_seq_length", "input_data_format", "pad_size"),
        *("processor_class", "return_tensors"),
    }
)


class ShortestEdge(Config):
    """The shorter side after resizing; the longer one keeps the aspect ratio."""

    shortest_edge: Size
    """Pixels."""


class HeightWidth(Config):
    """Both sides, whatever the aspect ratio was."""

    height: Size
    """Pixels."""
    width: Size
    """Pixels."""


def _sides(value: Any) -> Any:
    """A number, as in old files, or a pair as both sides."""
    if isinstance(value, int):
        return {"height": value, "width": value}
    if isinstance(value, list) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    return value


def _resized_sides(value: Any) -> Any:
    """A number as the shorter side, or what `_sides` reads."""
    return {"shortest_edge": value} if isinstance(value, int) else _sides(value)


def _of_each_channel(value: Any) -> Any:
    """A number as that of every channel, and a list as the tuple that a strict field wants."""
    return (value,) * 3 if isinstance(value, int | float) else tuple(value) if isinstance(value, list) else value


Positive = Annotated[float, Field(gt=0)]


@cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """A number for each channel, [3, 1, 1]; made once for each device, for a copy to it waits."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)


class CLIPImageProcessor(Config):
    """Prepares images for the image tower; fields and defaults as in transformers' CLIPImageProcessor."""

    do_resize: bool = True
    """Resize to `size`."""
    size: Annotated[ShortestEdge | HeightWidth, BeforeValidator(_resized_sides)] = ShortestEdge(shortest_edge=224)
    """The shorter side, or both."""
    resample: Literal[2, 3] = 3
    """Pillow's filter: 2 bilinear, 3 bicubic."""
    do_center_crop: bool = True
    """Cut out the middle, or fill up with black, to `crop_size`."""
    crop_size: Annotated[HeightWidth, BeforeValidator(_sides)] = HeightWidth(height=224, width=224)
    """Both sides after cropping."""
    do_rescale: bool = True
    """Multiply by `rescale_factor`."""
    rescale_factor: float = 1 / 255
    """Makes [0, 255] into [0, 1]."""
    do_normalize: bool = True
    """Subtract `image_mean`, divide by `image_std`."""
    image_mean: Annotated[tuple[float, float, float], BeforeValidator(_of_each_channel)] = IMAGE_MEAN
    """Per channel, after rescaling."""
    image_std: Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_of_each_channel)] = IMAGE_STD
    """Per channel, after rescaling."""
    do_pad: Literal[False] = False
    """Not supported."""

    @classmethod
    def from_hugging_face(cls, mapping: Mapping[str, Any]) -> Self:
        """Read the content of a preprocessor_config.json; null stands for the default.

        Raises:
            pydantic.ValidationError: unknown keys and values that are not implemented, one entry each.
        """
        used = {k: v for k, v in mapping.items() if v is not None and not (k.startswith("_") or k in _BOOKKEEPING)}
        return cls.from_mapping(used)

    @classmethod
    def for_side(cls, side: int) -> Self:
        """The one of a CLIP without the file: images of `side` × `side` pixels, else as OpenAI's."""
        return cls(size=ShortestEdge(shortest_edge=side), crop_size=HeightWidth(height=side, width=side))

    def to_hugging_face(self) -> dict[str, Any]:
        """Content of the preprocessor_config.json with which transformers prepares images as this does."""
        fields = {name: value for name, value in self.to_mapping().items() if name != "do_pad"}
        return {"image_processor_type": "CLIPImageProcessor", **fields, "do_convert_rgb": True}

    @property
    def side(self) -> int | None:
        """Height and width of every result; None where they are not square, or hang on the image."""
        size = self.crop_size if self.do_center_crop else self.size if self.do_resize else None
        return size.height if isinstance(size, HeightWidth) and size.height == size.width else None

    def __call__(self, images: Tensor) -> Tensor:
        """Images as the image tower wants them.

        Args:
            images: [B, 3, H, W] in [0, 255], uint8 or (for gradients with respect to pixels) any float.

        Returns:
            float32 [B, 3, height, width].
        """
        pixels = images.float()
        if self.do_resize:
            pixels = self._resized(pixels, in_levels=not images.is_floating_point())
        if self.do_center_crop:
            pixels = self._cropped(pixels)
        if self.do_rescale:
            pixels = pixels * self.rescale_factor
        if self.do_normalize:
            mean, deviation = (_per_channel(values, pixels.device) for values in (self.image_mean, self.image_std))
            pixels = (pixels - mean) / deviation
        return pixels

    def _resized(self, pixels: Tensor, in_levels: bool) -> Tensor:
        """At `size`, antialiased; as Pillow, first in width, then in height, each time clipped and rounded, half up."""
        height, width = pixels.shape[-2:]
        if isinstance(self.size, HeightWidth):
            new_height, new_width = self.size.height, self.size.width
        else:
            short = self.size.shortest_edge
            new_height, new_width = int(short * max(height, width) / width), int(short * max(height, width) / height)
        for shape in ((height, new_width), (new_height, new_width)):
            if pixels.shape[-2:] != shape:
                pixels = F.interpolate(pixels, shape, mode=_FILTERS[self.resample], antialias=True).clamp(0, 255)
                pixels = (pixels + 0.5).floor() if in_levels else pixels
        return pixels

    def _cropped(self, pixels: Tensor) -> Tensor:
        """The middle; where a side is too short, the image in the middle of black."""
        height, width = pixels.shape[-2:]
        margins = (self.crop_size.width - width, self.crop_size.height - height)
        # F.pad crops where a number is negative.
        return F.pad(pixels, [part for margin in margins for part in ((margin + 1) // 2, margin // 2)])
