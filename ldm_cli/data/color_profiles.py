"""Embedded ICC profiles: pictures as sRGB, converted by LittleCMS with the perceptual intent, Pillow's default."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageChops, ImageCms

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_SMALLEST_DIFFERENCE = 2  # of 255: less is rounding


class Conversion(NamedTuple):
    """How a picture becomes sRGB.

    Attributes:
        mode: Pillow's mode of the pixels that the profile describes: "L", "RGB" or "CMYK".
        transform: from that to RGB; None: the profile is sRGB, or there is none.
        remark: to be counted: "converted to sRGB" or "unusable color profile"; empty if nothing is done.
    """

    mode: str
    transform: ImageCms.ImageCmsTransform | None
    remark: str = ""

    def applied(self, image: Image.Image) -> Image.Image:
        """RGB of a picture without transparency."""
        if self.transform is None:
            return image.convert("RGB")
        converted = ImageCms.applyTransform(image.convert(self.mode), self.transform)
        assert converted is not None  # only a conversion in place gives nothing
        return converted


def color_mode(mode: str) -> str:
    """Which of "L", "RGB" and "CMYK" the colours of Pillow's mode are."""
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


@lru_cache(maxsize=64)
def conversion(profile: bytes | None, mode: str) -> Conversion:
    """The conversion for pixels of `mode` ("L", "RGB" or "CMYK") under an embedded profile, broken ones included.

    A profile of three colours also serves grey pixels, as equal parts of the three. Empty: there is no profile; None:
    there is one that cannot be read.
    """
    if profile == b"":
        return Conversion(mode, None)
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        described = _MODES[opened.profile.xcolor_space.strip()]
        if described != mode and (mode, described) != ("L", "RGB"):
            return Conversion(mode, None, "unusable color profile")
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), described, "RGB")
        probe = _probe(described)
        converted = ImageCms.applyTransform(probe, transform)
        assert converted is not None
    except Exception:  # Pillow and LittleCMS raise nearly every kind of exception on damaged profiles
        return Conversion(mode, None, "unusable color profile")
    extrema = ImageChops.difference(converted, probe.convert("RGB")).getextrema()
    if described != "CMYK" and max(high for _, high in extrema) <= _SMALLEST_DIFFERENCE:  # type: ignore[misc]
        return Conversion(mode, None)
    return Conversion(described, transform, "converted to sRGB")


def _probe(mode: str) -> Image.Image:
    """Six levels of each channel in all combinations; of CMYK without black."""
    levels = range(0, 256, 51)
    if mode == "L":
        image = Image.new("L", (6, 1))
        image.putdata(list(levels))
        return image
    image = Image.new("RGB", (6, 36))
    image.putdata([(r, g, b) for b in levels for g in levels for r in levels])
    return image.convert(mode)
