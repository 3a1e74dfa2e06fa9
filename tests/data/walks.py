"""The folders of the walks in docs/data.md: a phone's pictures, and what img2dataset downloads."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from tests.data.icc import SPACES, icc_profile

_COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "grey": (128, 128, 128)}


def _jpeg(color: tuple[int, int, int], orientation: int = 1, profile: bytes | None = None) -> bytes:
    """A picture of 64 × 48 pixels that is dark on the left."""
    image = Image.new("RGB", (64, 48), color)
    image.paste((0, 0, 0), (0, 0, 16, 48))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95, exif=exif, icc_profile=profile)
    return stream.getvalue()


def write_phone(folder: Path) -> None:
    """Pictures in Display P3, one of them upright by its EXIF alone, an AVIF, a broken file, and others."""
    profile = icc_profile(*SPACES["Display P3"])
    avif = io.BytesIO()
    Image.new("RGB", (64, 48), _COLORS["grey"]).save(avif, "AVIF")
    pictures = {
        "IMG_0001.JPG": _jpeg(_COLORS["red"], profile=profile),
        "IMG_0002.JPG": _jpeg(_COLORS["green"], orientation=6, profile=profile),
        "IMG_0003.jpeg": _jpeg(_COLORS["blue"])[:600],
        "IMG_0004.HEIC": b"\0\0\0\x18ftypheic" + bytes(500),
        "IMG_0005.MOV": b"\0\0\0\x14ftypqt  " + bytes(500),
        "IMG_0006.avif": avif.getvalue(),
        ".thumbnails/1.jpg": _jpeg(_COLORS["red"]),
    }
    for name, data in pictures.items():
        path = folder / "100APPLE" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_img2dataset(folder: Path) -> None:
    """Eight pictures with captions and facts as `img2dataset --output_format files` leaves them; the sixth failed."""
    part = folder / "00000"
    part.mkdir(parents=True)
    for number in range(8):
        key, color = f"{number:09d}", list(_COLORS)[number % 4]
        facts = {
            "caption": f"a {color} wall",
            "url": f"https://example.org/{number}.jpg",
            "key": key,
            "status": "success",
        }
        if number == 5:
            facts["status"] = "failed_to_download"
        else:
            (part / f"{key}.jpg").write_bytes(_jpeg(_COLORS[color]))
            (part / f"{key}.txt").write_text(f"a {color} wall", encoding="utf-8")
        (part / f"{key}.json").write_text(json.dumps(facts | {"similarity": float("nan")}), encoding="utf-8")
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text('{"count": 8, "successes": 7}', encoding="utf-8")
