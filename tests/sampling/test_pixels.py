"""What a call of the decoder takes, and which pictures it gives."""

from __future__ import annotations

import pytest
import torch

from ldm_cli.core.codec import PixelCodec
from ldm_cli.sampling.pixels import decode_pixels, pixels_per_call

GIB = 2**30


@pytest.mark.parametrize(("free", "cached", "pictures"), [(120, 0, 80), (15, 0, 10), (12, 3, 10), (1, 0, 0)])
def test_as_many_pictures_of_512_px_are_decoded_at_once_as_the_free_memory_of_the_gpu_holds(
    monkeypatch: pytest.MonkeyPatch, free: int, cached: int, pictures: int
) -> None:
    device = torch.device("cuda", 1)
    known = {
        "mem_get_info": (free * GIB, 141 * GIB),
        "memory_reserved": (8 + cached) * GIB,
        "memory_allocated": 8 * GIB,
    }
    for name, answer in known.items():
        monkeypatch.setattr(torch.cuda, name, {device: answer}.__getitem__)
    assert pixels_per_call(device) // 512**2 == pictures


def test_of_a_device_whose_memory_is_unknown_a_million_pixels_are_taken() -> None:
    assert pixels_per_call(torch.device("meta")) == 2**20


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_not_finite_give_no_picture_even_if_the_codec_hides_them(bad: float) -> None:
    class Clamping(PixelCodec):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents.nan_to_num(0.0, 1.0, -1.0)

    latents = torch.zeros(3, 3, 8, 8)
    latents[1, 0, 2, 3] = bad
    assert [picture is None for picture in decode_pixels(Clamping(), latents)] == [False, True, False]
