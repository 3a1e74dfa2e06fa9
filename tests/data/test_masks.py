"""Masks of pictures: found beside them, packed, and cut, resized and mirrored as the pictures are."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import Loader, sequential_batches
from ldm_cli.data.masks import MaskFiles
from ldm_cli.data.pack import pack
from ldm_cli.data.report import check
from ldm_cli.data.sample_decoder import Draw, Members, MembersDecoder, Sample, Wanted
from ldm_cli.errors import InputNotFoundError
from ldm_cli.reporting import SilentReporter
from tests.data.tars import numbered_sample, opened, png, write_tar

ORIENTATION = 0x0112


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.frombytes("L", size, random.Random(seed).randbytes(size[0] * size[1]))


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def decoded(picture: bytes, mask: bytes | None, draw: Draw = Draw(), **config: Any) -> Sample:
    settings = DataConfig.from_mapping({"shards": "", "image_size": 8, "mask": "mask.png", **config} | {"shards": "x"})
    members = {"png": picture, "mask.png": mask}
    return MembersDecoder(settings, Wanted(caption=False, label=False)).decode_members(
        Members(members.get, members), draw
    )


@pytest.mark.parametrize("crop", ["center", "random", "squash"])
def test_a_mask_is_cut_and_mirrored_exactly_as_its_picture(crop: str) -> None:
    size, chosen = (8, 8) if crop == "squash" else (29, 8), random.Random(1)
    picture = noise(size)
    seen = set()
    for _ in range(12):
        draw = Draw(across=chosen.random(), flip=chosen.random())
        found = decoded(saved(picture.convert("RGB")), saved(picture), draw, crop=crop, flip_probability=0.5)
        assert found.image is not None
        assert found.mask is not None
        assert torch.equal(found.mask[0], found.image[0])
        seen.add(found.mask.numpy().tobytes())
    assert len(seen) == 2 if crop != "random" else len(seen) > 6


def test_a_mask_is_resized_by_area() -> None:
    picture = noise((40, 16))
    whole = decoded(saved(picture), saved(picture), image_size=16).mask
    half = decoded(saved(picture), saved(picture)).mask
    assert whole is not None
    assert half is not None
    difference = (half.float() - avg_pool2d(whole.float(), 2)).abs()
    assert difference.max() <= 1, "rows and columns are each rounded"


def test_a_mask_lies_on_a_turned_photo_that_is_decoded_at_a_part_of_its_size() -> None:
    upright = Image.new("L", (600, 400))
    upright.paste(255, (300, 100, 470, 330))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo = saved(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)
    found = decoded(photo, saved(upright), Draw(across=0.8), image_size=32, crop="random")
    assert found.image is not None
    assert found.mask is not None
    assert found.image.float().std() > 50
    assert (found.mask[0].float() - found.image[0].float()).abs().mean() < 2


def test_colours_and_transparency_of_a_mask_become_weights() -> None:
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 255))
    mask.paste((255, 255, 255, 0), (0, 0, 4, 8))
    found = decoded(png(), saved(mask)).mask
    assert found is not None
    assert found[0, 0].tolist() == [0] * 4 + [255] * 4
    grey = decoded(png(), saved(Image.new("1", (8, 8), 1))).mask
    assert grey is not None
    assert grey.unique().tolist() == [255]


def test_a_sample_without_a_mask_counts_in_full_and_is_counted_and_one_of_another_size_is_bad() -> None:
    found = decoded(png(), None)
    assert found.mask is not None
    assert (found.mask.unique().tolist(), found.remarks) == ([255], ("no mask",))
    with pytest.raises(BadSampleError, match="mask of another size: 8×9 for a picture of 8×8"):
        decoded(png(), saved(noise((8, 9))))


def masked_shard(path: Path, masked: set[int]) -> Path:
    members = []
    for number in range(4):
        members += numbered_sample(number)
        members += [(f"{number:04d}.mask.png", saved(noise((8, 8), number)))] if number in masked else []
    return write_tar(path, members)


def test_batches_hold_masks_where_the_recipe_names_them(tmp_path: Path) -> None:
    masked_shard(tmp_path / "a.tar", {0, 2})
    shards, config = opened(tmp_path / "a.tar", mask="mask.png")
    (batch,) = sequential_batches(shards, config, 4)
    assert batch.masks is not None
    assert batch.masks.shape == (4, 1, 8, 8)
    for number in range(4):
        own = torch.frombuffer(bytearray(noise((8, 8), number).tobytes()), dtype=torch.uint8).view(8, 8)
        assert torch.equal(batch.masks[number, 0], own if number in {0, 2} else torch.full_like(own, 255))
    report = check(shards, config, SilentReporter())
    assert (report["ok"], report["remarks"], report["not_used"]) == (True, {"no mask": 2}, {"json": 4})
    plain, config = opened(tmp_path / "a.tar")
    assert next(Loader(plain, config, seed=0, batch_size=4).batches(0, 1)).masks is None
    assert check(plain, config, SilentReporter())["first_not_used"][1] == "a/0000.mask.png"


def test_masks_of_a_name_that_no_sample_has_are_an_error_and_held_out_ones_may_have_none(tmp_path: Path) -> None:
    masked_shard(tmp_path / "a.tar", {1})
    with pytest.raises(InputNotFoundError, match=r"no sample of data.shards has a mask '\.masque.png'"):
        opened(tmp_path / "a.tar", mask="masque.png")
    masked_shard(tmp_path / "b.tar", set())
    opened(f"{tmp_path}/[ab].tar", mask="mask.png")


@pytest.mark.parametrize("mask", ["One.mask.png", "one-MASKLABEL.png", "masks/one.png"])
@pytest.mark.parametrize("table", [False, True])
def test_masks_are_packed_with_their_pictures_and_are_no_pictures(tmp_path: Path, mask: str, table: bool) -> None:
    (tmp_path / "photos/masks").mkdir(parents=True)
    for name in ("one.png", "two.mask.png"):
        (tmp_path / "photos" / name).write_bytes(png())
    (tmp_path / "photos" / mask).write_bytes(saved(noise((8, 8))))
    if table:
        (tmp_path / "photos/list.csv").write_text("file,text\none.png,a\ntwo.mask.png,b\n")
    report = pack(tmp_path / "photos", tmp_path / "packed", SilentReporter())
    assert (report["samples"], report["with_mask"], report["bad"], report["not_read"]) == (2, 1, {}, {})
    shards, config = opened(tmp_path / "packed", mask="mask.png", missing_caption="empty", label=None)
    (batch,) = sequential_batches(shards, config, 4)
    assert batch.masks is not None
    assert batch.masks[0].tolist() != batch.masks[1].tolist() == torch.full((1, 8, 8), 255).tolist()


def test_a_mask_that_does_not_fit_costs_its_picture_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, size in {"a.png": (8, 8), "a.mask.png": (4, 8), "b.png": (8, 8)}.items():
        (tmp_path / "photos" / name).write_bytes(png(size=size))
    report = pack(tmp_path / "photos", tmp_path / "packed", SilentReporter())
    assert (report["samples"], report["with_mask"]) == (1, 0)
    assert report["bad_files"] == ["a.png: mask of another size: 4×8 for a picture of 8×8"]


def test_a_picture_without_a_folder_of_masks_has_none(tmp_path: Path) -> None:
    assert MaskFiles().of(tmp_path / "nowhere/a.png") is None
