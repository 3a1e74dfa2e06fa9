"""Every pixel format, orientation and damage, against values worked out by hand."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
import torch
from PIL import Image

from ldm_cli.data import decode
from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.decode import Crop, decode_rgb, image_header, to_rectangle

BACKGROUND = (10, 200, 100)
MAX_PIXELS = 10_000


def _encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _pixels(data: bytes) -> list[tuple[int, int, int]]:
    image = decode_rgb(data, BACKGROUND, MAX_PIXELS).image
    assert image.mode == "RGB"
    raw = image.tobytes()
    return [(raw[i], raw[i + 1], raw[i + 2]) for i in range(0, len(raw), 3)]


def _over(color: tuple[int, int, int], alpha: int) -> tuple[int, int, int]:
    """`color` over the background, from the definition; Pillow may round the last bit otherwise."""
    r, g, b = (round((c * alpha + back * (255 - alpha)) / 255) for c, back in zip(color, BACKGROUND, strict=True))
    return r, g, b


def _image(mode: str, values: list[Any]) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


def _close(found: list[tuple[int, int, int]], expected: list[tuple[int, int, int]], tolerance: int = 0) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= tolerance, (found, expected)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_plain_colours_survive_every_lossless_format(format: str) -> None:
    colors = [(255, 0, 0), (0, 255, 0), (1, 2, 3), (250, 251, 252)]
    options = {"lossless": True} if format == "WEBP" else {}
    _close(_pixels(_encoded(_image("RGB", colors), format, **options)), colors)


def test_jpeg_is_read_and_cmyk_becomes_rgb() -> None:
    _close(_pixels(_encoded(Image.new("RGB", (8, 8), (40, 90, 200)), "JPEG", quality=95)), [(40, 90, 200)] * 64, 3)
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for format, tolerance in (("TIFF", 0), ("JPEG", 3)):
        _close(_pixels(_encoded(cmyk, format)), [(0, 255, 255)] * 64, tolerance)


def test_grey_and_bilevel_become_grey_rgb() -> None:
    _close(_pixels(_encoded(_image("L", [0, 7, 255]))), [(0,) * 3, (7,) * 3, (255,) * 3])  # type: ignore[list-item]
    _close(_pixels(_encoded(_image("1", [0, 255]))), [(0, 0, 0), (255, 255, 255)])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(format: str) -> None:
    values = [0, 128, 129, 257, 32768, 40000, 65535]
    expected = [(round(v / 257),) * 3 for v in values]
    _close(_pixels(_encoded(_image("I;16", values), format)), expected)  # type: ignore[arg-type]


def test_pixels_without_a_defined_range_are_refused() -> None:
    for image in (_image("F", [0.5]), _image("I", [70_000]), _image("I", [-1])):
        with pytest.raises(BadSampleError, match="unsupported pixel format"):
            _pixels(_encoded(image, "TIFF"))


def test_transparency_is_laid_over_the_background() -> None:
    color, alphas = (200, 20, 240), [0, 1, 128, 254, 255]
    expected = [_over(color, alpha) for alpha in alphas]
    _close(_pixels(_encoded(_image("RGBA", [(*color, a) for a in alphas]))), expected, 1)
    _close(_pixels(_encoded(_image("RGBA", [(*color, a) for a in alphas]), "TIFF")), expected, 1)
    grey = [_over((90, 90, 90), alpha) for alpha in alphas]
    _close(_pixels(_encoded(_image("LA", [(90, a) for a in alphas]))), grey, 1)


def test_transparent_colours_of_palettes_grey_and_rgb_show_the_background() -> None:
    palette = _image("P", [0, 1, 2])
    palette.putpalette([9, 8, 7, 255, 0, 0, 0, 0, 255])
    expected = [BACKGROUND, (255, 0, 0), (0, 0, 255)]
    _close(_pixels(_encoded(palette, transparency=0)), expected)
    _close(_pixels(_encoded(palette, "GIF", transparency=0)), expected)
    _close(_pixels(_encoded(palette)), [(9, 8, 7), *expected[1:]])
    half = [_over((9, 8, 7), 128), _over((255, 0, 0), 0), (0, 0, 255)]
    _close(_pixels(_encoded(palette, transparency=bytes([128, 0, 255]))), half, 1)
    _close(_pixels(_encoded(_image("L", [5, 6]), transparency=5)), [BACKGROUND, (6, 6, 6)])
    _close(_pixels(_encoded(_image("RGB", [(1, 2, 3), (4, 5, 6)]), transparency=(1, 2, 3))), [BACKGROUND, (4, 5, 6)])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "P"])
def test_a_large_picture_is_converted_in_bands_to_the_same_pixels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (13, 11)
    depth = {"RGBA": 4, "LA": 2, "I;16": 2, "P": 1}[mode]
    noise = torch.randint(256, (13 * 11 * depth,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.frombytes(mode, size, bytes(noise.tolist()))
    if mode == "P":
        image.putpalette([value * 7 % 256 for value in range(768)])
    data = _encoded(image, **({"transparency": 3} if mode == "P" else {}))
    whole = decode_rgb(data, BACKGROUND, MAX_PIXELS).image
    monkeypatch.setattr(decode, "_BAND_PIXELS", 3 * 13)  # three rows: the last band has two
    assert decode_rgb(data, BACKGROUND, MAX_PIXELS).image.tobytes() == whole.tobytes()


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = _encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert _pixels(data) == [(255, 0, 0)] * 16


# How the stored picture 1 2 3 / 4 5 6 must be shown, from the EXIF standard (tag 274: which side of the
# shown picture the stored rows and columns are).
SHOWN = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG", "AVIF"])
def test_exif_orientation_is_applied_once(orientation: int, format: str) -> None:
    scale = 16  # blocks, so that JPEG keeps them
    stored = Image.new("L", (3, 2))
    stored.putdata([40 * v for v in (1, 2, 3, 4, 5, 6)])
    stored = stored.resize((3 * scale, 2 * scale), Image.Resampling.NEAREST).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = _encoded(stored, format, exif=exif, **options)
    shown = decode_rgb(data, BACKGROUND, MAX_PIXELS).image
    assert image_header(data, MAX_PIXELS) == (format, *shown.size)
    rows = SHOWN[orientation]
    assert shown.size == (len(rows[0]) * scale, len(rows) * scale)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            pixel = shown.getpixel((x * scale + scale // 2, y * scale + scale // 2))
            assert isinstance(pixel, tuple)
            assert abs(pixel[0] - 40 * value) <= (4 if format in ("JPEG", "AVIF") else 0)


def test_broken_exif_means_no_orientation() -> None:
    data = _encoded(Image.new("RGB", (4, 2)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert decode_rgb(data, BACKGROUND, MAX_PIXELS).image.size == (4, 2)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF"])
def test_a_truncated_image_is_damaged_wherever_it_ends(format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (24 * 24 * 3,), generator=generator, dtype=torch.uint8)
    data = _encoded(Image.frombytes("RGB", (24, 24), bytes(noise.tolist())), format)
    for end in range(0, len(data) * 9 // 10, max(1, len(data) // 40)):
        with pytest.raises(BadSampleError) as caught:
            decode_rgb(data[:end], BACKGROUND, MAX_PIXELS)
        assert caught.value.reason in {"empty image", "not an image", "damaged image"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image"),
        (b"<!DOCTYPE html><html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"P6 1 1 255\n\xff\0\0", "not an image"),
    ],
)
def test_what_is_no_image_of_the_known_formats_is_never_opened(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        decode_rgb(data, BACKGROUND, MAX_PIXELS)
    assert caught.value.reason == reason


def _png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"]
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _webp_claiming(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("size", [(101, 100), (12_000, 12_000), (50_000, 50_000)])
def test_a_header_that_claims_too_many_pixels_is_refused_before_decoding(size: tuple[int, int]) -> None:
    data = [_png_claiming(*size)] + ([_webp_claiming(*size)] if max(size) < 16_384 else [])
    for one in data:
        with pytest.raises(BadSampleError) as caught:
            decode_rgb(one, BACKGROUND, MAX_PIXELS)
        assert caught.value.reason == "too many pixels"


def test_the_header_alone_tells_format_and_size() -> None:
    assert image_header(_encoded(Image.new("RGB", (7, 5)), "GIF"), MAX_PIXELS) == ("GIF", 7, 5)


def to_square(image: Image.Image, size: int, crop: Crop, place: float = 0.5, mirror: bool = False) -> torch.Tensor:
    return to_rectangle(image, (size, size), crop, (place, place), mirror)


def _ramp(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x, y, 0) for y in range(height) for x in range(width)])
    return image


@pytest.mark.parametrize(("place", "first"), [(0.0, 0), (0.5, 3), (0.999, 5), (1.0, 5)])
def test_a_crop_without_resizing_keeps_pixels_exactly(place: float, first: int) -> None:
    square = to_square(_ramp(13, 8), 8, "random", place)
    assert square.dtype == torch.uint8
    assert square.shape == (3, 8, 8)
    first = {0: 0, 3: 3, 5: 5}[first]
    assert square[0].tolist() == [list(range(first, first + 8))] * 8
    assert square[1].tolist() == [[y] * 8 for y in range(8)]
    tall = to_square(_ramp(8, 13), 8, "random", place)
    assert tall[1, :, 0].tolist() == list(range(first, first + 8))


def test_each_place_of_a_random_crop_is_equally_likely() -> None:
    starts = [int(to_square(_ramp(11, 8), 8, "random", (k + 0.5) / 400)[0, 0, 0]) for k in range(400)]
    assert [starts.count(start) for start in range(4)] == [100] * 4


def test_mirror_is_left_to_right_and_squash_takes_the_whole_picture() -> None:
    plain, mirrored = (to_square(_ramp(8, 8), 8, "center", mirror=mirror) for mirror in (False, True))
    assert torch.equal(mirrored, plain.flip(-1))
    squashed = to_square(_ramp(240, 8), 8, "squash")[0, 0].float()
    assert squashed[0] < 20
    assert squashed[-1] > 220
    cropped = to_square(_ramp(240, 8), 8, "center")[0, 0].float()
    assert 100 < cropped[0] < cropped[-1] < 140


def test_shrinking_averages_and_does_not_pick_pixels() -> None:
    checks = Image.new("L", (64, 64))
    checks.putdata([255 * ((x + y) % 2) for y in range(64) for x in range(64)])
    square = to_square(checks.convert("RGB"), 8, "center")
    assert abs(square.float() - 127.5).max() < 3


def test_a_jpeg_decoded_at_reduced_size_is_the_same_picture() -> None:
    data = _encoded(_ramp(250, 250).resize((80, 80)), "JPEG", quality=95)
    whole, reduced = (decode_rgb(data, BACKGROUND, MAX_PIXELS, side).image for side in (None, 8))
    assert whole.size == (80, 80)
    assert reduced.size == (20, 20)
    difference = to_square(whole, 8, "center").int() - to_square(reduced, 8, "center").int()
    assert difference.abs().max() <= 4


def _photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Structure of every scale, as in photographs, where the power falls with the square of the frequency."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.full((1, 3, size[1], size[0]), 128.0)
    for side, amplitude in ((3, 60.0), (9, 30.0), (27, 15.0), (81, 7.0)):
        coarse = torch.randn(1, 3, side, side, generator=generator)
        pixels += amplitude * torch.nn.functional.interpolate(coarse, (size[1], size[0]), mode="bicubic")
    raw = pixels[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).flatten()
    return Image.frombytes("RGB", size, bytes(raw.tolist()))


@pytest.mark.parametrize("size", [(64, 64), (40, 100), (90, 60), (300, 70), (960, 720)])
@pytest.mark.parametrize("side", [24, 64])
def test_resizing_is_that_of_pillow_up_to_rounding(size: tuple[int, int], side: int) -> None:
    image = _photo(size)
    width, height = size
    short, left, top = min(size), (width - min(size)) // 2, (height - min(size)) // 2
    for crop, box in (("center", (left, top, left + short, top + short)), ("squash", (0, 0, width, height))):
        found = to_square(image, side, crop)  # type: ignore[arg-type]
        pillow = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        expected = torch.frombuffer(bytearray(pillow.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 4, crop
        assert difference.float().mean() < 0.7, crop


@pytest.mark.parametrize("quality", [75, 95])
def test_a_reduced_decode_of_a_photograph_keeps_its_quality(quality: int) -> None:
    data = _encoded(_photo((512, 384)), "JPEG", quality=quality)
    for side, reduced_height in ((32, 96), (64, 192), (90, 192), (97, 384)):
        whole, reduced = (decode_rgb(data, BACKGROUND, 10**6, min_side).image for min_side in (None, side))
        assert reduced.height == reduced_height
        assert reduced.height >= 2 * side
        difference = to_square(whole, side, "center").float() - to_square(reduced, side, "center").float()
        psnr = 20 * torch.log10(255 / difference.square().mean().sqrt().clamp(min=0.01))
        assert psnr > 42, (side, float(psnr))


def test_a_rectangle_is_the_largest_part_of_its_shape() -> None:
    image = _ramp(40, 30)
    assert to_rectangle(image, (30, 40), "center")[0, 0].tolist() == list(range(40))
    wide = to_rectangle(image, (10, 40), "random", (0.5, 0.5))  # all columns, a third of the rows
    assert wide.shape == (3, 10, 40)
    assert wide[0, 0].tolist() == list(range(40))
    assert wide[1, :, 0].tolist() == list(range(10, 20))
    tall = to_rectangle(image, (30, 10), "random", (0.0, 0.0), mirror=True)
    assert tall[0, 0].tolist() == list(range(9, -1, -1))
    assert tall[1, :, 0].tolist() == list(range(30))
    assert to_rectangle(_ramp(1, 30), (8, 64), "center").shape == (3, 8, 64)


def test_a_native_part_keeps_its_pixels_and_lies_anywhere() -> None:
    found = to_rectangle(_ramp(40, 30), (8, 10), "native", (0.99, 0.5))
    assert found[0, 0].tolist() == list(range(30, 40))
    assert found[1, :, 0].tolist() == list(range(11, 19))
    small = to_rectangle(_ramp(5, 4), (8, 10), "native", (0.3, 0.9))
    assert torch.equal(small, to_rectangle(_ramp(5, 4), (8, 10), "center")), "a smaller picture is enlarged"


def _webp_frame_claiming(width: int, height: int, lossless: bool) -> bytes:
    if lossless:
        frame, kind = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(20), b"VP8L"
    else:
        frame, kind = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(20), b"VP8 "
    body = b"WEBP" + kind + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_what_takes_more_memory_than_its_pixels_counts_for_more() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    at_half, at_two_thirds = Image.new("RGB", (75, 75)), Image.new("RGB", (85, 85))
    for data, times in {
        _encoded(at_half, "WEBP"): "4",
        _encoded(at_half, "AVIF"): "4",
        _webp_frame_claiming(60, 60, lossless=False): "4",
        _webp_frame_claiming(60, 60, lossless=True): "4",
        _encoded(at_half, "TIFF", exif=turned): "2",
        _encoded(at_two_thirds, "JPEG", progressive=True): "1.5",
        _encoded(at_half.convert("CMYK"), "JPEG", progressive=True): "2",
    }.items():
        with pytest.raises(BadSampleError, match=f"which count {times} times in this kind of file"):
            decode_rgb(data, BACKGROUND, MAX_PIXELS)
    for data in (_encoded(at_half, "TIFF"), _encoded(at_two_thirds, "JPEG"), _encoded(at_half.convert("CMYK"), "JPEG")):
        assert min(decode_rgb(data, BACKGROUND, MAX_PIXELS).image.size) >= 75


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "I;16"])
def test_a_huge_picture_is_averaged_before_it_is_turned(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = _photo((230, 170))
    image = photo.convert("L").convert("I").point(lambda value: value * 257).convert(mode) if mode == "I;16" else None
    image = image or (photo.quantize(256) if mode == "P" else photo.convert(mode))
    data = _encoded(image, exif=exif)
    whole = decode_rgb(data, BACKGROUND, 10**6).image
    assert whole.size == (170, 230)
    monkeypatch.setattr(decode, "_HUGE_PIXELS", 10_000)
    monkeypatch.setattr(decode, "_BAND_PIXELS", 230 * 25)
    reduced = decode_rgb(data, BACKGROUND, 10**6, 13).image
    assert reduced.size == (85, 115)
    difference = to_square(whole, 13, "center").float() - to_square(reduced, 13, "center").float()
    assert difference.square().mean().sqrt() < 2
