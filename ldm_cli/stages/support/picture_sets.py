"""Sets of pictures: a picture, a folder of files, or shards."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm_cli.data.config import DataConfig
from ldm_cli.data.decode import decode_rgb, from_pillow, image_header
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.prefetch import prefetched
from ldm_cli.data.sample_decoder import SampleDecoder, Wanted
from ldm_cli.data.tables import is_picture, text_lines
from ldm_cli.errors import DataError, InputNotFoundError, LdmError
from ldm_cli.inputs import MOST_PICTURE_BYTES, read_input
from ldm_cli.pictures.provenance import IMAGES_FILE
from ldm_cli.reporting import Reporter

_MAX_PIXELS = DataConfig.model_fields["max_pixels"].default
_BACKGROUND = DataConfig.model_fields["background"].default


@dataclass(frozen=True)
class PictureSet:
    """Pictures in a fixed order.

    Attributes:
        name: as the user gave it.
        files: the name of each picture, and a function that reads its file.
        decode: a file's content to uint8 [3, H, W].
        caption: of the picture with a number; empty if it has none.
        job: model and settings that all pictures of `ldm sample` share; else empty.
    """

    name: str
    files: Sequence[tuple[str, Callable[[], bytes]]]
    decode: Callable[[bytes], Tensor]
    caption: Callable[[int], str]
    job: Mapping[str, Any] = field(default_factory=dict)

    def batches(
        self, size: int, first: int = 0, step: int = 1, unreadable: dict[int, str] | None = None
    ) -> Generator[tuple[list[Tensor], Tensor]]:
        """The pictures, uint8 [3, H, W] each, in lists, with the SHA-256 of their files; read ahead by threads.

        Args:
            size: of a list; the last one may be shorter.
            first, step: yield the list of this number, and each that is a multiple of `step` after it.
            unreadable: receives the numbers of pictures that cannot be read, and why; they are left out. None: the
                first of them is an error.

        Yields:
            A list, and uint8 [B, 32].

        Raises:
            DataError: a picture cannot be read, without `unreadable`.
            StorageError: reading failed.
        """

        def found(number: int) -> tuple[Tensor, bytes] | None:
            try:
                return self._decoded(self.files[number])
            except DataError as error:
                if unreadable is None:
                    raise
                unreadable[number] = error.cause
                return None

        def decoded() -> Generator[list[tuple[Tensor, bytes]]]:
            with ThreadPoolExecutor(thread_name_prefix="ldm-decode") as pool:
                for start in range(first * size, len(self.files), step * size):
                    numbers = range(start, min(start + size, len(self.files)))
                    if batch := [one for one in pool.map(found, numbers) if one is not None]:
                        yield batch

        with prefetched(decoded(), alone=True) as batches:
            for batch in batches:
                hashes = torch.tensor([list(own) for _, own in batch], dtype=torch.uint8)
                yield [picture for picture, _ in batch], hashes

    def picture(self, number: int) -> Tensor:
        """One picture, uint8 [3, H, W]; errors as in `batches`."""
        return self._decoded(self.files[number])[0]

    def _decoded(self, file: tuple[str, Callable[[], bytes]]) -> tuple[Tensor, bytes]:
        name, read = file
        try:
            data = read()
            return self.decode(data), hashlib.sha256(data).digest()
        except LdmError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly every kind of exception on damaged files
            raise DataError(f"cannot read picture '{name}' of '{self.name}'", str(error)) from error


def as_stored(data: bytes) -> Tensor:
    """The pixels as the programs decode them that compute FID: colour profiles and orientations have no effect."""
    image_header(data, _MAX_PIXELS)
    with Image.open(io.BytesIO(data)) as image:
        return from_pillow(image.convert("RGB"))[0]


def upright(data: bytes) -> Tensor:
    """The picture as people see it and training reads it: sRGB, upright, transparent parts over white."""
    return from_pillow(decode_rgb(data, _BACKGROUND, _MAX_PIXELS).image)[0]


def open_pictures(source: str, reporter: Reporter, decode: Callable[[bytes], Tensor] = as_stored) -> PictureSet:
    """The pictures of a folder and all below it, sorted by path; or those of shards.

    Of a folder that `ldm sample` wrote, the pictures that its images.json names.

    Args:
        source: a picture, a folder of pictures, or a path, glob or brace pattern of shards, or a folder of shards.
        reporter: as in `open_shards`.
        decode: as in `PictureSet`.

    Raises:
        InputNotFoundError: there is none; other errors as in `open_shards`.
    """
    folder = Path(source)
    if folder.is_file() and is_picture(folder):
        own = [(folder.name, partial(read_input, folder, MOST_PICTURE_BYTES))]
        return PictureSet(source, own, decode, lambda number: _caption_beside(folder))
    if folder.is_dir() and not any(folder.glob("*.tar")):
        listed, job = _listed(folder)
        paths = list(listed) or sorted(path for path in folder.rglob("*") if is_picture(path))
        if not paths:
            raise InputNotFoundError(f"there are no pictures in '{source}'")
        files = [(str(path.relative_to(folder)), partial(read_input, path, MOST_PICTURE_BYTES)) for path in paths]
        return PictureSet(
            source, files, decode, lambda number: listed.get(paths[number]) or _caption_beside(paths[number]), job
        )
    if not folder.exists() and not set(source) & set("*?[{:"):  # no pattern and no address: users know no data.shards
        raise InputNotFoundError(f"there is no '{source}'", remedy="give a picture, a folder, or shards")
    config = DataConfig(shards=source)
    shards = open_shards(source, config, reporter)
    images = SampleDecoder(shards, config, Wanted(caption=False))
    captions = SampleDecoder(shards, config, Wanted(image=False))

    def reader(shard: int, number: int) -> Callable[[], bytes]:
        return lambda: images.image_bytes(shard, number)

    places = [(shard, number) for shard, size in enumerate(shards.sizes) for number in range(size)]
    return PictureSet(
        source,
        [(shards.name(*place), reader(*place)) for place in places],
        decode,
        lambda number: next(iter(captions.captions(*places[number])), ""),
    )


def _caption_beside(picture: Path) -> str:
    """The text in `NAME.txt` or `NAME.caption` beside a picture, empty if there is none."""
    for file in (picture.with_suffix(suffix) for suffix in (".txt", ".caption")):
        if file.is_file():
            return " ".join("".join(text_lines(file, lambda remark: None)).split())
    return ""


def _listed(folder: Path) -> tuple[dict[Path, str], Mapping[str, Any]]:
    """The pictures of images.json with their prompts, and its job; both empty where there is none, or another's."""
    try:
        content = json.loads(read_input(folder / IMAGES_FILE, MOST_PICTURE_BYTES))
        return {folder / image["file"]: str(image.get("prompt") or "") for image in content["images"]}, content["job"]
    except (LdmError, ValueError, KeyError, TypeError, RecursionError):
        return {}, {}
