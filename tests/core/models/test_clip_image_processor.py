"""The image processor where no gradients are wanted, and where they are."""

from __future__ import annotations

import torch

from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor


def test_gradients_reach_the_pixels_also_after_a_call_in_inference_mode() -> None:
    processor = CLIPImageProcessor.for_side(4)
    with torch.inference_mode():
        processor(torch.zeros(1, 3, 4, 4))
    pixels = torch.full((1, 3, 4, 4), 100.0, requires_grad=True)
    processor(pixels).sum().backward()
    assert pixels.grad is not None
    expected = torch.tensor([1 / (255 * deviation) for deviation in processor.image_std])
    torch.testing.assert_close(pixels.grad, expected.view(1, 3, 1, 1).expand(1, 3, 4, 4))
