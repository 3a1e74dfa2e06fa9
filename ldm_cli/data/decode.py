"""From the bytes of a picture file to 8-bit sRGB, and from that to the uint8 tensor that a model gets.

An embedded colour profile is applied, 16-bit values are scaled, palettes and CMYK converted, transparency laid over the
background colour, the EXIF orientation applied, the first frame taken of an animation. The size in the header is
checked before anything is decoded, and a truncated file is an error.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from PIL import Image, ImageMath, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.color_profiles import Conversion, color_mode, conversion

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
"""Members that hold an image, the preferred ones first."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_WITH_ALPHA = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
_SIXTEEN_BIT = frozenset(("I", "I;16", "I;16B", "I;16L", "I;16N"))
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_MUCH_LARGER = 6  # times the side of the result
_BAND_PIXELS = 1 << 20
_HUGE_PIXELS = 1 << 21
_WHOLE_WEIGHT = 4.0  # of WebP and AVIF: two canvases, a copy as bytes and the picture

# The limit is data.max_pixels, checked for every image; Pillow's own would warn or raise at another one.
Image.MAX_IMAGE_PIXELS = None
# Bytes of a compressed profile or text in a PNG. Pillow's own limit of 1 MiB refuses real profiles and workflows.
PngImagePlugin.MAX_TEXT_CHUNK = 2**24

Color = tuple[int, int, int]
Crop = Literal["center", "random", "squash", "native"]
Place = tuple[float, float]  # along width and height, from 0 (left, top) to 1
CENTRE: Place = (0.5, 0.5)


class Picture(NamedTuple):
    """A decoded picture.

    Attributes:
        image: 8-bit RGB, in sRGB.
        size: height and width as the file has them, upright; those of `image` may be smaller.
        remarks: conversions of its colours, to be counted: "converted to sRGB", "unusable color profile".
    """

    image: Image.Image
    size: tuple[int, int]
    remarks: tuple[str, ...]


def load_codecs() -> None:
    """Import Pillow's readers of the usual formats, so that not each worker does."""
    Image.preinit()


def decode_rgb(data: bytes, background: Color, max_pixels: int, min_side: int | None = None) -> Picture:
    """The picture in a file, as 8-bit sRGB.

    Args:
        data: a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file, recognised by its content.
        background: colour behind transparent pixels.
        max_pixels: most pixels that its header may claim.
        min_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if both sides keep twice this, and a huge picture
            may be averaged over blocks of pixels if both sides keep three times this.

    Raises:
        BadSampleError: "empty image", "not an image", "too many pixels", "damaged image" or "unsupported
            pixel format".
    """
    image = _open(data, max_pixels)
    width, height = image.size
    try:
        if min_side is not None:
            image.draft(None, (2 * min_side, 2 * min_side))
        image.load()
        orientation = _orientation(image)  # Pillow has already applied it to TIFFs
        # Pillow has an empty one where it could not unpack it.
        profile = (image.info["icc_profile"] or None) if "icc_profile" in image.info else b""
        to_srgb = conversion(profile, color_mode(image.mode))
        if image.format == "PNG":
            _scale_transparent_color(image, depth=data[24])
        result = _to_rgb(image, to_srgb, background, _reduction(image.size, min_side))
        result = result.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else result
    except BadSampleError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly every kind of exception on damaged files
        raise BadSampleError("damaged image", str(error)) from error
    size = (width, height) if orientation >= 5 else (height, width)
    return Picture(result, size, (to_srgb.remark,) if to_srgb.remark else ())


def image_header(data: bytes, max_pixels: int) -> tuple[str, int, int]:
    """Pillow's name of the format, and width and height as `decode_rgb` gives them: upright.

    Only the header is read. A PNG is decoded if there is no EXIF before its pixels: it may follow them. Raises as
    `decode_rgb`.
    """
    image = _open(data, max_pixels)
    is_turned = _orientation(image) >= 5 and image.format != "TIFF"  # Pillow gives the upright size of a TIFF
    width, height = reversed(image.size) if is_turned else image.size
    return image.format or "", width, height


def from_pillow(image: Image.Image) -> Tensor:
    """An RGB picture → uint8 [1, 3, H, W], channels last in memory."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2)


def to_rectangle(
    image: Image.Image, size: tuple[int, int], crop: Crop, place: Place = CENTRE, mirror: bool = False
) -> Tensor:
    """Cut the largest part that has the shape of the result, and resize it: bicubic, antialiased, once.

    Args:
        image: RGB.
        size: height and width of the result, in pixels (H, W).
        crop: `squash` takes the whole picture and changes its aspect ratio; `native` takes a part of the size of the
            result, where the picture is larger.
        place: where the part lies.

    Returns:
        uint8 [3, H, W].
    """
    height, width = size
    box = (0, 0, *image.size) if crop == "squash" else part_of(image.size, width, height, place, crop)
    if (box[2] - box[0]) * (box[3] - box[1]) > _MUCH_LARGER**2 * width * height:
        # Pillow averages blocks first: less to hold in memory, and quicker here.
        image = image.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    elif box != (0, 0, *image.size):
        image = image.crop(box)
    result = from_pillow(image)
    if result.shape[2:] != size:
        # In bytes and channels last, torch's resize is several times as fast as Pillow's, from which it differs
        # by the rounding of the last bit.
        result = interpolate(result, size, mode="bicubic", antialias=True)
    if mirror:
        result = result.flip(-1)
    return result[0].contiguous()


def part_of(size: tuple[int, int], width: int, height: int, place: Place, crop: Crop) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the largest part of a picture that has the shape width × height; with the crop
    `native` of a part of that size, where there is one.

    Whole source pixels, so that a picture that needs no resizing is cut, not blurred by half a pixel.
    """
    part_width = max(1, min(size[0], round(size[1] * width / height)))
    part_height = max(1, min(size[1], round(size[0] * height / width)))
    if crop == "native" and part_width > width:
        part_width, part_height = width, height
    left = min(int(place[0] * (size[0] - part_width + 1)), size[0] - part_width)
    top = min(int(place[1] * (size[1] - part_height + 1)), size[1] - part_height)
    return left, top, left + part_width, top + part_height


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The picture by its header; a file of another kind, or of too many pixels, is refused."""
    if not data:
        raise BadSampleError("empty image")
    _check_size(_webp_size(data), max_pixels, _WHOLE_WEIGHT)
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise BadSampleError("not an image", "none of " + ", ".join(_FORMATS)) from error
    except Exception as error:
        raise BadSampleError("damaged image", str(error)) from error
    _check_size(image.size, max_pixels, _weight(image))
    return image


def _check_size(size: tuple[int, int], max_pixels: int, weight: float) -> None:
    width, height = size
    if width * height * weight > max_pixels:
        counted = f", which count {weight:g} times in this kind of file," if weight > 1 else ","
        raise BadSampleError("too many pixels", f"{width}×{height}{counted} more than data.max_pixels={max_pixels}")


def _weight(image: Image.Image) -> float:
    """How many times the usual four bytes decoding holds for each pixel; a WebP was weighed before it was opened."""
    if image.format == "AVIF":
        return _WHOLE_WEIGHT
    if image.format == "TIFF" and _orientation(image) > 1:
        return 2.0  # Pillow turns it while loading
    if image.info.get("progressive"):
        return max(1.0, len(image.getbands()) / 2)  # all coefficients, of two bytes
    return 1.0


def _webp_size(data: bytes) -> tuple[int, int]:
    """The size that a WebP header claims: Pillow allocates it while opening, before it can be asked."""
    if data[:4] != b"RIFF" or len(data) < 30:
        return 0, 0
    if data[8:16] == b"WEBPVP8X":
        low, high = struct.unpack("<IH", data[24:30])
        return (low & 0xFFFFFF) + 1, (low >> 24 | high << 8) + 1
    if data[8:16] == b"WEBPVP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if data[8:16] == b"WEBPVP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return 0, 0


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) if there is none or it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION) or 1)
    except Exception:
        return 1


def _reduction(size: tuple[int, int], min_side: int | None) -> int:
    """Side of the blocks over which a picture is averaged: of a huge one, a copy in full would be too much to hold."""
    if min_side is None:
        return 1
    return max(1, min(math.ceil(math.sqrt(size[0] * size[1] / _HUGE_PIXELS)), min(size) // (3 * min_side)))


def _scale_transparent_color(image: Image.Image, depth: int) -> None:
    """Bring the colour that a PNG of `depth` bits calls transparent to the scale of the loaded pixels."""
    color = image.info.get("transparency")
    if isinstance(color, int) and depth in (2, 4) and image.mode == "L":
        image.info["transparency"] = color * 255 // (2**depth - 1)
    elif isinstance(color, tuple) and depth == 16:
        image.info["transparency"] = tuple(level >> 8 for level in color)


def _to_rgb(image: Image.Image, to_srgb: Conversion, background: Color, reduction: int) -> Image.Image:
    """8-bit sRGB of any pixel format, averaged over blocks."""
    if image.mode == "F":
        raise BadSampleError("unsupported pixel format", "floating-point pixels have no defined range")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        return _in_bands(image, lambda band: _over(background, to_srgb, band), reduction)
    if image.mode in _SIXTEEN_BIT:
        return _in_bands(image, lambda band: to_srgb.applied(_eight_bit(band)), reduction)
    if image.mode == "RGB" and to_srgb.transform is None and reduction == 1:
        return image
    return _in_bands(image, to_srgb.applied, reduction)


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image], reduction: int) -> Image.Image:
    """The converted picture, averaged over blocks. A large one is converted in bands, to hold little at a time."""
    rows = max(1, _BAND_PIXELS // image.width // reduction) * reduction
    if rows >= image.height:
        return _averaged(convert(image), reduction)
    result = Image.new("RGB", (-(-image.width // reduction), -(-image.height // reduction)))
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(_averaged(convert(band), reduction), (0, top // reduction))
    return result


def _averaged(image: Image.Image, reduction: int) -> Image.Image:
    return image if reduction == 1 else image.reduce(reduction)


def _over(background: Color, to_srgb: Conversion, image: Image.Image) -> Image.Image:
    """A picture with transparent pixels over a colour."""
    if image.mode in _SIXTEEN_BIT:
        hidden, levels = image.info["transparency"], image.convert("I")
        alpha = ImageMath.lambda_eval(lambda v: v["convert"]((v["levels"] != hidden) * 255, "L"), levels=levels)
        color = _eight_bit(image)
    else:
        with_alpha = image.convert("LA" if color_mode(image.mode) == "L" else "RGBA")
        color, alpha = with_alpha.convert(with_alpha.mode[:-1]), with_alpha.getchannel("A")
    color = to_srgb.applied(color).convert("RGBA")
    color.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), color).convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """0…65535 to 0…255, rounded to nearest (65535 = 255 · 257)."""
    wide = image.convert("I")
    extrema = wide.getextrema()
    if min(extrema) < 0 or max(extrema) > 65535:  # type: ignore[operator]
        raise BadSampleError("unsupported pixel format", f"integer pixels from {extrema[0]} to {extrema[1]}")
    return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")
