"""Colours as a colour-managed viewer shows them: against Pillow's ImageCms, and against the matrices of the spaces."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms

from ldm_cli.data.config import DataConfig
from ldm_cli.data.decode import decode_rgb
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import data as stage
from tests.data.icc import SPACES, Matrix, cmyk_profile, icc_profile
from tests.data.tars import png_chunk

BACKGROUND = (10, 200, 100)
COLORS = [(255, 0, 0), (0, 255, 0), (20, 40, 220), (128, 128, 128), (250, 240, 10), (0, 0, 0), (255, 255, 255)]
SRGB_FROM_XYZ = [[3.13385, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07194, -0.22898, 1.40524]]


def shown(color: tuple[int, ...], matrix: Matrix, gamma: float) -> list[int]:
    """The sRGB levels of a colour, by the definition of the spaces."""
    linear = [(c / 255) ** gamma for c in color]
    xyz = [sum(m * c for m, c in zip(row, linear, strict=True)) for row in matrix]
    rgb = [min(1.0, max(0.0, sum(m * c for m, c in zip(row, xyz, strict=True)))) for row in SRGB_FROM_XYZ]
    return [round(255 * (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055)) for c in rgb]


def _encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _row(mode: str, values: list[Any]) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def _decoded(data: bytes) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    picture = decode_rgb(data, BACKGROUND, 10_000)
    raw = picture.image.tobytes()
    return [tuple(raw[i : i + 3]) for i in range(0, len(raw), 3)], picture.remarks


def _off(found: list[tuple[int, ...]], expected: list[Any]) -> int:
    assert len(found) == len(expected)
    return max(abs(a - b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_an_embedded_profile_is_applied(space: str, form: str) -> None:
    profile = icc_profile(*SPACES[space])
    options = {"lossless": True} if form == "WEBP" else {}
    found, remarks = _decoded(_encoded(_row("RGB", COLORS), form, icc_profile=profile, **options))
    assert remarks == ("converted to sRGB",)
    assert _off(found, [shown(color, *SPACES[space]) for color in COLORS]) <= 2
    reference = ImageCms.profileToProfile(
        _row("RGB", COLORS), ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    )
    assert reference is not None
    assert found == list(reference.getdata())


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "I;16", "1"])
def test_a_profile_is_applied_to_every_kind_of_pixels(mode: str) -> None:
    matrix, _ = SPACES["Adobe RGB"]
    levels = [0, 60, 128, 200, 255]
    gamma = 1.5
    if mode in ("RGBA", "P"):
        image = _row("RGB", COLORS)
        image = image.quantize(len(COLORS)) if mode == "P" else _row("RGBA", [(*color, 255) for color in COLORS])
        data = _encoded(image, icc_profile=icc_profile(matrix, gamma))
        expected = [shown(color, matrix, gamma) for color in COLORS]
    else:
        values = {"L": levels, "LA": [(v, 255) for v in levels], "I;16": [v * 257 for v in levels], "1": [0, 255]}
        data = _encoded(_row(mode, values[mode]), icc_profile=icc_profile([], gamma, b"GRAY"))
        levels = [0, 255] if mode == "1" else levels
        expected = [shown((v, v, v), SPACES["exchanged"][0], gamma) for v in levels]
    found, remarks = _decoded(data)
    assert remarks == ("converted to sRGB",)
    assert _off(found, expected) <= 2


@pytest.mark.parametrize("form", ["TIFF", "JPEG"])
def test_the_profile_of_printing_inks_is_applied(form: str) -> None:
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 200, 40, 0), (30, 60, 90, 120), (0, 0, 0, 255)]
    image = Image.new("CMYK", (16 * len(inks), 16))
    for number, ink in enumerate(inks):
        image.paste(ink, (16 * number, 0, 16 * number + 16, 16))
    data = _encoded(image, form, icc_profile=cmyk_profile(), **({"quality": 100} if form == "JPEG" else {}))
    pixels = Image.open(io.BytesIO(data))
    reference = ImageCms.profileToProfile(
        pixels, ImageCms.ImageCmsProfile(io.BytesIO(cmyk_profile())), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    found, remarks = _decoded(data)
    assert remarks == ("converted to sRGB",)
    assert reference is not None
    assert found == list(reference.getdata())
    assert _off(found, list(pixels.convert("RGB").getdata())) > 30, "the profile must matter"


def test_transparency_is_laid_over_the_background_after_the_conversion() -> None:
    image = _row("RGBA", [(*COLORS[0], 0), (*COLORS[1], 128), (*COLORS[2], 255)])
    found, _ = _decoded(_encoded(image, icc_profile=icc_profile(*SPACES["exchanged"])))
    green = [
        (c * 128 + back * 127) / 255 for c, back in zip(shown(COLORS[1], *SPACES["exchanged"]), BACKGROUND, strict=True)
    ]
    assert _off(found, [BACKGROUND, green, shown(COLORS[2], *SPACES["exchanged"])]) <= 2


@pytest.mark.parametrize(
    "profile",
    [b"x", bytes(128), icc_profile(*SPACES["Adobe RGB"])[:200], icc_profile([], 2.2, b"GRAY"), b"\xff" * 3000],
    ids=["one byte", "zeros", "cut", "of grey", "garbage"],
)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_broken_profile_is_counted_and_the_pixels_stay(profile: bytes, form: str) -> None:
    image = Image.new("RGB", (8, 8), (40, 90, 200))
    found, remarks = _decoded(_encoded(image, form, icc_profile=profile))
    assert remarks == ("unusable color profile",)
    assert found == _decoded(_encoded(image, form))[0]


def _png_with(kind: bytes, content: bytes) -> bytes:
    """A PNG of one colour with a further chunk after its header."""
    data = _encoded(Image.new("RGB", (8, 8), (40, 90, 200)))
    return data[:33] + png_chunk(kind, content) + data[33:]


@pytest.mark.parametrize("packed", [b"no zlib stream", zlib.compress(bytes(3000))[:20], b"x", b""])
def test_a_profile_that_cannot_be_unpacked_is_counted_and_the_pixels_stay(packed: bytes) -> None:
    found, remarks = _decoded(_png_with(b"iCCP", b"x\0\0" + packed))
    assert (found, remarks) == ([(40, 90, 200)] * 64, ("unusable color profile",))


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt"])
def test_a_profile_or_a_text_of_some_megabytes_costs_no_picture(kind: bytes) -> None:
    profile = icc_profile(*SPACES["Display P3"]) + bytes(5_000_000)
    found, remarks = _decoded(_png_with(kind, b"x\0\0" + zlib.compress(profile)))
    if kind == b"iCCP":
        assert remarks == ("converted to sRGB",)
        assert _off(found, [shown((40, 90, 200), *SPACES["Display P3"])] * 64) <= 2
    else:
        assert (found, remarks) == ([(40, 90, 200)] * 64, ())


def test_srgb_itself_changes_nothing_and_is_not_counted() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert _decoded(_encoded(_row("RGB", COLORS), icc_profile=profile)) == (COLORS, ())


def test_conversions_are_counted_by_check_and_pack(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, profile in (("a", icc_profile(*SPACES["Display P3"])), ("b", b"x"), ("c", None)):
        (folder / f"{name}.png").write_bytes(_encoded(_row("RGB", COLORS), icc_profile=profile))
        (folder / f"{name}.txt").write_text("x")
    counts = {"converted to sRGB": 1, "unusable color profile": 1}
    assert stage.pack(folder, tmp_path / "out", SilentReporter())["remarks"] == counts
    assert stage.check(DataConfig(shards=str(tmp_path / "out")), SilentReporter())["remarks"] == counts


def _grey_png(depth: int, levels: list[int], transparent: int) -> bytes:
    """A PNG of one row, written by hand."""
    bits = "".join(f"{level:0{depth}b}" for level in levels)
    row = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    header = struct.pack(">IIBBBBB", len(levels), 1, depth, 0, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"tRNS", struct.pack(">H", transparent)),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_level_of_a_grey_picture_shows_the_background_at_every_depth(depth: int) -> None:
    most = 2**depth - 1
    levels = sorted({0, 1, most // 3, most // 2, most // 2 + 1, most})
    for transparent in levels:
        found, _ = _decoded(_grey_png(depth, levels, transparent))
        expected = [BACKGROUND if v == transparent else (round(v * 255 / most),) * 3 for v in levels]
        assert _off(found, expected) <= (1 if depth == 16 else 0), transparent


@pytest.mark.parametrize("color", [(65535, 0, 0), (4096, 512, 60000)])
def test_the_transparent_color_of_a_deep_picture_shows_the_background(color: tuple[int, int, int]) -> None:
    pixels = struct.pack(">6H", *color, 257, 514, 771)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", pixels[:6]), (b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)
    assert _decoded(data)[0] == [BACKGROUND, (1, 2, 3)]


def test_avif_is_read() -> None:
    found, _ = _decoded(_encoded(Image.new("RGB", (8, 8), (40, 90, 200)), "AVIF", quality=95))
    assert _off(found, [(40, 90, 200)] * 64) <= 4
