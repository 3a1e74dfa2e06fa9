"""Images as bytes and as numbers."""

from __future__ import annotations

import torch

from ldm_cli.core.pixels import to_bytes, to_signed

CPU = torch.device("cpu")


def test_every_byte_survives_the_way_to_numbers_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    signed = to_signed(images, CPU)
    assert (float(signed.min()), float(signed.max())) == (-1.0, 1.0)
    assert torch.equal(to_bytes(signed), images)
    assert to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
