"""The sizes that are recorded of a training picture are those of what the network is shown."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm_cli.data.decode import decode_rgb, to_rectangle
from ldm_cli.data.loader import Loader
from ldm_cli.data.picture_sizes import picture_sizes
from tests.data.tars import opened, write_tar


@pytest.mark.parametrize(
    ("original", "target", "crop", "place", "mirror", "expected"),
    [
        ((20, 40), (10, 10), "center", 0.5, False, [20, 40, 0, 5, 10, 10]),
        ((40, 20), (10, 10), "center", 0.5, False, [40, 20, 5, 0, 10, 10]),
        ((20, 40), (10, 10), "random", 0.0, False, [20, 40, 0, 0, 10, 10]),
        ((20, 40), (10, 10), "random", 0.0, True, [20, 40, 0, 10, 10, 10]),
        ((20, 40), (40, 40), "random", 0.0, True, [20, 40, 0, 40, 40, 40]),
        ((20, 40), (10, 10), "squash", 0.0, True, [20, 40, 0, 0, 10, 10]),
        ((20, 40), (10, 10), "native", 0.99, False, [20, 40, 10, 30, 10, 10]),
        ((20, 40), (16, 32), "center", 0.5, False, [20, 40, 0, 0, 16, 32]),
    ],
)
def test_sizes_are_height_and_width_cut_and_result(
    original: tuple[int, int], target: tuple[int, int], crop: Any, place: float, mirror: bool, expected: list[int]
) -> None:
    assert picture_sizes(original, target, crop, (place, place), mirror).tolist() == expected


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.99])
def test_the_recorded_cut_is_the_cut(place: float, mirror: bool) -> None:
    """Of a picture whose columns are numbered, before and after it is mirrored."""
    image = Image.new("RGB", (45, 10))
    image.putdata([(column, row, 0) for row in range(10) for column in range(45)])
    result = to_rectangle(image, (10, 12), "random", (place, place), mirror)
    _, _, top, left, _, _ = picture_sizes((10, 45), (10, 12), "random", (place, place), mirror).tolist()
    first = int(result[0, 0, 0])
    assert left == (44 - first if mirror else first)
    assert top == 0


def rotated_jpeg(width: int, height: int) -> bytes:
    """A JPEG to be turned by 90° and large enough to be decoded at a part of its size."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (width, height), (9, 9, 9)).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize(("crop", "number"), [("center", 1), ("squash", 1), ("random", 4), ("native", 4)])
def test_only_random_cuts_differ_from_sample_to_sample(tmp_path: Path, crop: str, number: int) -> None:
    stream = io.BytesIO()
    image = Image.new("L", (200, 8))
    image.putdata(list(range(200)) * 8)
    image.save(stream, "PNG")
    write_tar(tmp_path / "0.tar", [("a.png", stream.getvalue()), ("a.txt", b"a")])
    shards, config = opened(tmp_path, label=None, crop=crop)
    (batch,) = Loader(shards, config, seed=0, batch_size=4).batches(0, 1)
    assert batch.sizes is not None
    assert len(batch.images.flatten(1).unique(dim=0)) == len(batch.sizes.unique(dim=0)) == number
    if crop == "center":
        assert batch.images[0, 0, 0, 0] == batch.sizes[0, 3] == 96


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_of_a_file_is_upright_in_every_format(kind: str, orientation: int) -> None:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (7, 5)).save(stream, kind, exif=exif)
    picture = decode_rgb(stream.getvalue(), (0, 0, 0), 1000)
    assert picture.size == picture.image.size[::-1] == ((7, 5) if orientation >= 5 else (5, 7))


def test_a_batch_says_the_upright_sizes_of_its_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", rotated_jpeg(300, 200)), ("a.txt", b"a")])
    shards, config = opened(tmp_path, label=None, flip_probability=1.0)
    (batch,) = Loader(shards, config, seed=0, batch_size=2).batches(0, 1)
    assert batch.sizes is not None
    assert batch.sizes.tolist() == [[300, 200, 2, 0, 8, 8]] * 2
    assert batch.parts(2)[1].sizes.tolist() == [[300, 200, 2, 0, 8, 8]]  # type: ignore[union-attr]
    (plain,) = Loader(shards, config, seed=0, batch_size=2, with_images=False).batches(0, 1)
    assert plain.sizes is None


def test_sizes_of_a_bucket_are_those_of_its_shape(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", rotated_jpeg(640, 200)), ("a.txt", b"a")])
    buckets = {"step": 8, "max_aspect": 2.0}
    shards, config = opened(tmp_path, label=None, image_size=32, aspect_buckets=buckets)
    (batch,) = Loader(shards, config, seed=0, batch_size=1).batches(0, 1)
    assert batch.sizes is not None
    assert torch.equal(batch.sizes[0, 4:], torch.tensor(batch.images.shape[2:]))
    height, width = batch.images.shape[2:]
    resized = 640 * width / 200  # its height, once the width fits
    assert abs(int(batch.sizes[0, 2]) - (resized - height) / 2) <= 1
