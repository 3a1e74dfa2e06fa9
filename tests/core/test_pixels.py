"""Bytes and numbers of images, and constants per channel."""

from __future__ import annotations

import torch

from ldm_cli.core.pixels import per_channel, to_bytes, to_signed

CPU = torch.device("cpu")


def test_every_byte_survives_the_way_to_numbers_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    signed = to_signed(images, CPU)
    assert (float(signed.min()), float(signed.max())) == (-1.0, 1.0)
    assert torch.equal(to_bytes(signed), images)
    assert to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_constants_are_made_once_and_take_part_in_autograd_wherever_they_were_made() -> None:
    with torch.inference_mode():
        mean = per_channel((0.25, 0.5), CPU)
    assert mean.shape == (2, 1, 1)
    assert per_channel((0.25, 0.5), CPU) is mean
    x = torch.ones(1, 2, 1, 1, requires_grad=True)
    (x * mean).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0.25, 0.5]
