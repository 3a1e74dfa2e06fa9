"""Blur, resampling and JPEG against closed forms, torch and Pillow."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm_cli.core.degradation import blurred, jpeg, resampled
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.data.decode import from_pillow
from ldm_cli.pictures.images import to_pillow


def picture(height: int = 48, width: int = 64) -> Tensor:
    """Smooth shapes with some edges, float32 [2, 3, H, W] in [−1, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    waves = torch.stack([torch.sin(2 * x + y), torch.cos(x * y), torch.sin(3 * y) * torch.cos(x)])
    return torch.stack([0.8 * waves, torch.where(x + y > 3, 0.7, -0.5) * torch.ones(3, 1, 1)])


@pytest.mark.parametrize("size", [(24, 32), (12, 16), (17, 20)])
def test_resampling_between_edges_is_that_of_torch(size: tuple[int, int]) -> None:
    expected = F.interpolate(picture(), size, mode="bicubic", antialias=True)
    assert (resampled(picture(), size, corners=False) - expected).abs().max() < 1e-5


def test_resampling_between_corners_keeps_every_pixel_in_its_place() -> None:
    ramp = torch.linspace(-1, 1, 65)[None, None, None].expand(1, 3, 33, 65)
    small = resampled(ramp, (9, 17), corners=True)
    assert torch.allclose(small[0, 0, 4, 2:-2], torch.linspace(-1, 1, 17)[2:-2], atol=1e-5)
    back = F.interpolate(small, (33, 65), mode="bilinear", align_corners=True)
    inner = slice(9, -9)
    assert (back - ramp)[..., inner].abs().max() < 1e-5
    shifted = F.interpolate(resampled(ramp, (9, 17), corners=False), (33, 65), mode="bilinear", align_corners=True)
    assert (shifted - ramp)[..., inner].abs().max() > 0.02


def test_blur_adds_its_variance_to_that_of_a_spot() -> None:
    spot = torch.zeros(2, 1, 41, 41)
    spot[..., 20, 20] = 1.0
    made = blurred(spot, torch.tensor([0.0, 2.5]))
    assert torch.equal(made[0], spot[0])
    place = torch.arange(41.0) - 20
    assert float(made[1].sum()) == pytest.approx(1.0, abs=1e-4)
    assert float((made[1, 0].sum(0) * place**2).sum()) == pytest.approx(2.5**2, rel=1e-3)


@pytest.mark.parametrize("size", [(48, 64), (45, 50)])
def test_jpeg_is_that_of_libjpeg_for_each_quality(size: tuple[int, int]) -> None:
    images, qualities = to_bytes(picture(*size)), (20, 85)
    made = to_bytes(jpeg(to_signed(images, torch.device("cpu")), torch.tensor(qualities)))
    for ours, image, quality in zip(made, images, qualities, strict=True):
        file = io.BytesIO()
        to_pillow(image).save(file, format="JPEG", quality=quality)
        theirs = from_pillow(Image.open(file))[0]
        difference = (ours.int() - theirs.int()).abs()
        assert (image.int() - theirs.int()).abs().float().mean() > 0.3, "the compression changes nothing"
        # A coefficient halfway between two steps may go either way, and a block with it.
        assert difference.float().mean() < 1.0
        assert difference.float().quantile(0.8) <= 2.0
        assert difference.float().mean() < 0.3 * (image.int() - theirs.int()).abs().float().mean()
