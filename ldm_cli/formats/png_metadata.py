"""The provenance that a picture file holds: the `parameters` text of AUTOMATIC1111's web UI, and our own JSON.

PNG keeps both as text chunks, `parameters` and `ldm_cli`. JPEG and WebP keep `parameters` in EXIF's UserComment, where
the web UI puts it, and ours in ImageDescription.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from ldm_cli.errors import DataError, LdmError
from ldm_cli.inputs import open_input

PARAMETERS, OURS = "parameters", "ldm_cli"
_NEGATIVE = "Negative prompt: "
_COMMENT_CHARSET = b"UNICODE\0"
_MOST_EXIF_BYTES = 65_000


def format_parameters(prompt: str, negative: str, fields: Mapping[str, Any]) -> str:
    """The text that the web UI, and all that read its pictures, keep under `parameters`.

    Args:
        prompt: verbatim.
        negative: verbatim; empty: left out.
        fields: `Steps`, `Sampler`, …, in this order; None is left out. Fewer than three would be read as a prompt.
    """
    last = ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None)
    return f"{prompt}\n{_NEGATIVE}{negative}\n{last}" if negative else f"{prompt}\n{last}"


def png_chunks(texts: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    """Text chunks in Unicode (iTXt), for `Image.save(pnginfo=…)`."""
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in texts.items():
        chunks.add_itxt(keyword, value)
    return chunks


def exif(texts: Mapping[str, str]) -> bytes:
    """The same in EXIF, for `Image.save(exif=…)`; ours is left out where both exceed what a JPEG can hold."""
    data = Image.Exif()
    if PARAMETERS in texts:
        comment = _COMMENT_CHARSET + texts[PARAMETERS].encode("utf-16-be", "replace")
        data.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    if OURS in texts:
        data[ExifTags.Base.ImageDescription] = json.dumps(json.loads(texts[OURS]))  # ASCII, which this tag is
    if len(data.tobytes()) > _MOST_EXIF_BYTES:
        return exif({PARAMETERS: texts[PARAMETERS][: _MOST_EXIF_BYTES // 4]})
    return data.tobytes()


def read_provenance(path: Path) -> dict[str, Any]:
    """Our provenance in a picture.

    Raises:
        InputNotFoundError: there is no such file.
        DataError: it is no picture, or not one of `ldm sample`, or without metadata.
    """
    try:
        with open_input(path) as file, Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            text = image.info.get(OURS) or image.getexif().get(ExifTags.Base.ImageDescription)
            provenance = json.loads(text) if text else None
    except LdmError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly every kind of exception on damaged files
        raise DataError(f"cannot read '{path}'", str(error) or type(error).__name__) from error
    if not isinstance(provenance, dict) or not isinstance(provenance.get("prompt"), str):
        raise DataError(f"'{path}' does not say how it was made", "it holds no provenance of ldm sample")
    return provenance


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",\n:") else text
