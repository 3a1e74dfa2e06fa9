"""Small shards for tests, written by the standard library, so that no code under test makes its own input."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_cli.data.config import DataConfig
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.shards import ShardSet
from ldm_cli.reporting import SilentReporter

Members = Sequence[tuple[str, bytes]]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(color: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def numbered_sample(number: int, **extra: Any) -> list[tuple[str, bytes]]:
    """A sample whose number can be read off its picture, its caption, its class and its JSON."""
    return [
        (f"{number:04d}.png", png((number % 256, number // 256, 77))),
        (f"{number:04d}.txt", f"caption {number}".encode()),
        (f"{number:04d}.cls", str(number).encode()),
        (f"{number:04d}.json", json.dumps({"number": number, **extra}).encode()),
    ]


def numbered_shards(folder: Path, sizes: Sequence[int]) -> Path:
    """Shards of these sizes, samples numbered from 0 throughout."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, size in enumerate(sizes):
        members = [m for number in range(first, first + size) for m in numbered_sample(number)]
        write_tar(folder / f"{shard:03d}.tar", members)
        first += size
    return folder


def opened(shards: Path | str, **config: Any) -> tuple[ShardSet, DataConfig]:
    settings = DataConfig.from_mapping({"shards": str(shards), "image_size": 8, "label": "cls", **config})
    return open_shards(settings.shards, settings, SilentReporter()), settings


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG that claims a size, with chunks between its header and its data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body
