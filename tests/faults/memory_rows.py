"""Rows of the fault matrix: files and words made to exhaust memory, met by real commands."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.tars import Members, numbered_sample, png, png_chunk, png_with, write_tar
from .lives import Life
from .matrix import Bench, Row

ALLOWANCE = 300 * 2**20
"""Bytes by which the peak of a command may exceed that of a clean one."""


def transparent_png(side: int) -> bytes:
    """A whole PNG of transparent pixels, which a few hundred kilobytes hold."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes(side * (4 * side + 1)), 1))
    return b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")


def animation(frames: int, side: int) -> bytes:
    """A GIF of so many frames of one pixel each on a square canvas."""
    frame = b"\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0"
    screen = struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return b"GIF89a" + screen + frame * frames + b"\x3b"


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _tiff(side: int) -> bytes:
    """An uncompressed TIFF that claims a size and holds one strip of nothing."""
    entries = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, side), (279, side**2)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + directory + bytes(4)


def members_of_bombs() -> dict[str, Members]:
    """Samples that are each a bomb, by name."""
    zeros = zlib.compress(bytes(1 << 28), 9)
    images = {
        "pixels.png": png_with(50_000, 50_000),
        "pixels-by-20kB.png": png_with(16_000, 16_000, png_chunk(b"IDAT", zlib.compress(bytes(1 << 24), 9))),
        "text.png": png_with(8, 8, *[png_chunk(b"zTXt", b"a\0\0" + zeros)] * 4),
        "profile.png": png_with(8, 8, png_chunk(b"iCCP", b"a\0\0" + zeros)),
        "transparent.png": transparent_png(7990),
        "canvases.webp": _encoded(Image.new("RGB", (3990, 3990)), "WEBP", method=0),
        "canvas.webp": _encoded(Image.new("RGB", (7990, 7990)), "WEBP", method=0),
        "coefficients.jpg": _encoded(Image.new("RGB", (6500, 6500)), "JPEG", progressive=True, subsampling=0),
        "turned.png": _encoded(Image.new("RGB", (7990, 7990)), "PNG", exif=_turned(), compress_level=1),
        "ink.jpg": _encoded(Image.new("CMYK", (7990, 7990)), "JPEG"),
        "frames.gif": animation(30_000, 4000),
        "strip.tif": _tiff(40_000),
    }
    captions = {"long": b"x" * (1 << 20), "wide": "\U0001f600".encode() * (1 << 18), "blank": b" " * (1 << 20)}
    values = {"deep": b"[" * (1 << 20), "digits": b'{"caption": ' + b"9" * (1 << 20) + b"}"}
    found: dict[str, Members] = {name: [(name, data), (f"{name[:-4]}.txt", b"t")] for name, data in images.items()}
    found |= {name: [(f"{name}.png", png()), (f"{name}.txt", text)] for name, text in captions.items()}
    found |= {name: [(f"{name}.png", png()), (f"{name}.json", text)] for name, text in values.items()}
    return found


def _claims(path: Path, num_bytes: int) -> None:
    """A tar whose first member has so many bytes, all of them holes."""
    header = tarfile.TarInfo("0.png")
    header.size = num_bytes
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + num_bytes + 1024)


def _long_names(path: Path, num_bytes: int) -> None:
    """A tar of good samples and a PAX header of so many bytes."""
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("x" * num_bytes + ".png"), io.BytesIO())


def _sparse(path: Path) -> None:
    """A tar of good samples and a sparse member that is to become 3 GiB."""
    with (path.parent / "0.png").open("wb") as file:
        file.truncate(3 << 30)
    subprocess.run(["tar", "-rSf", str(path), "-C", str(path.parent), "0.png"], check=True)


def hostile_shards(folder: Path) -> dict[str, Path]:
    """Shards that are bombs, by name; most with four good samples before the bomb."""
    good = [member for number in range(4) for member in numbered_sample(number)]
    for name, members in members_of_bombs().items():
        write_tar(folder / f"{name}.tar", [*good, *members])
    for name in ("pax", "sparse"):
        write_tar(folder / f"{name}.tar", good)
    _claims(folder / "member.tar", 7 << 30)
    _long_names(folder / "pax.tar", 64 << 20)
    _sparse(folder / "sparse.tar")
    with gzip.open(folder / "gzip.tar", "wb", compresslevel=1) as file:
        for _ in range(1024):
            file.write(bytes(1 << 20))
    return {path.stem: path for path in sorted(folder.glob("*.tar"))}


def memory(bench: Bench) -> None:
    """Bombs of pixels, members, names and text, in shards, recipes and prompts: a documented code, and the peak memory
    of a clean run of the same command, but for 300 MiB."""
    folder = bench.fresh().parent
    write_tar(folder / "clean", [member for number in range(4) for member in numbered_sample(number)])
    for name, text in {"clean": "name: x\n", "bomb": _yaml_bomb(), "long": "a: " + "x" * 30_000_000}.items():
        (folder / f"{name}.yaml").write_text(text)
    check = ["data", "check", "image_size=8"]
    model = bench.home.finished("unet") / "model"
    draw = ["sample", "--model", str(model), "--steps", "1", "--size", "32", "--out", str(folder / "o"), "--overwrite"]
    shards = {name: [*check, str(path)] for name, path in hostile_shards(folder).items()}
    _measure(bench, [*check, str(folder / "clean")], {0}, shards, {0, 65})
    recipes = {name: ["recipe", "check", str(folder / f"{name}.yaml")] for name in ("bomb", "long")}
    _measure(bench, ["recipe", "check", str(folder / "clean.yaml")], {78}, recipes, {78})
    prompts = {"prompt of 100,000 characters": [*draw, "-p", "red " * 25_000]}
    _measure(bench, [*draw, "-p", "a red circle"], {0}, prompts, {0})
    every = ["data.max_bad_fraction=1", "train.steps=12", f"data.shards={folder}/[!g]*.tar", "data.on_bad_shard=skip"]
    clean = bench.home.arguments("vae", bench.fresh())
    _measure(bench, clean, {0}, {"an epoch of training": bench.home.arguments("vae", bench.fresh(), *every)}, {0})


def _measure(
    bench: Bench, clean: Sequence[str], sound: set[int], cases: dict[str, list[str]], allowed: set[int]
) -> None:
    """Compare the peaks of commands with that of a clean one."""
    log = bench.folder / "log"
    first = Life(clean, log)
    bench.tally.judge(first, sound, " ".join(clean[:2]))
    worst = {}
    for name, arguments in list(cases.items())[: bench.trials or None]:
        life = Life(arguments, log)
        bench.tally.judge(life, allowed, name)
        worst[name] = life.peak - first.peak
        if worst[name] > ALLOWANCE:
            bench.tally.silent.append(f"{name}: {worst[name] >> 20} MiB more than a clean run")
        bench.tally.trials += 1
    most = max(worst, key=worst.__getitem__)
    bench.tally.note += f"{'; ' if bench.tally.note else ''}{most}: {worst[most] >> 20:+d} MiB"
    (bench.folder / "peaks.jsonl").open("a").write(json.dumps([first.peak, worst]) + "\n")


def _yaml_bomb() -> str:
    names = "abcdefghijklmnop"
    return "a: &a [x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(names))


ROWS: dict[str, tuple[Row, int]] = {"memory": (memory, 0)}
