"""Pictures as bytes to latents and back, in windows where networks cannot take them whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_cli.core.codec import Codec
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.sampling.edit_input import EditInput, LatentEditInput, adain, latent_mask
from ldm_cli.sampling.fixed_rows import DECODED_PIXELS, filled, images_per_call, row_groups
from ldm_cli.sampling.tiling import in_parts

# Per pixel of a decoder as Stable Diffusion's. Its live activations take half of that in float32: 256 channels of the
# full size three times at once. The other half is for what convolutions and norms need within.
_BYTES_PER_PIXEL = 6 * 2**10
_PIXELS_OF_UNKNOWN_MEMORY = 2**20
_LARGEST = torch.finfo(torch.float16).max


def is_sound(images: Tensor) -> Tensor:
    """Whether each of [N, 3, H, W] images is free of NaN, infinity and absurd numbers: bool [N].

    Images are about ±1: what fp16 cannot express has overflowed, whatever the precision.
    """
    return (images.abs() <= _LARGEST).flatten(1).all(1)


def decode_images(codec: Codec, latents: Tensor, window: int | None = None) -> Tensor:
    """Latents [N, C, h, w] → images [N, 3, H, W] in [−1, 1], not clamped; in windows of `window` latents, if given."""
    return in_parts(codec.decode, latents, window, 1, codec.factor)


@torch.inference_mode()
def decode_pixels(codec: Codec, latents: Tensor, window: int | None = None) -> list[Tensor | None]:
    """Latents [N, C, h, w] → N pictures, uint8 [3, H, W] on the CPU; windows as in `decode_images`.

    None stands for a picture whose latents or pixels overflow.
    """
    height, width = (side if window is None else min(side, window) for side in latents.shape[-2:])
    num_pixels = height * width * codec.factor**2
    most = max(1, pixels_per_call(latents.device) // num_pixels)
    pictures: list[Tensor | None] = []
    for images, rows in row_groups(len(latents), images_per_call(DECODED_PIXELS, num_pixels), latents.device, most):
        part = latents[images]
        decoded = decode_images(codec, filled(part, rows), window)[: len(part)]
        kept = (part.isfinite().flatten(1).all(1) & is_sound(decoded)).tolist()
        pixels = to_bytes(decoded).cpu()
        pictures += [picture if keep else None for picture, keep in zip(pixels, kept, strict=True)]
    return pictures


def pixels_per_call(device: torch.device) -> int:
    """Most pixels of a call of the decoder off the CPU: on CUDA as many as fit into the free memory of the device."""
    if device.type != "cuda":
        return _PIXELS_OF_UNKNOWN_MEMORY
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + cached) // _BYTES_PER_PIXEL


@torch.inference_mode()
def encode_pixels(
    codec: Codec, pixels: Tensor, device: torch.device, window: int | None = None, hidden: Tensor | None = None
) -> Tensor:
    """A picture → the mode of its latents, float32 [1, C, h, w].

    Args:
        pixels: uint8 [3, H, W].
        window: side, in latents, of the windows that the codec sees; None: it sees all.
        hidden: bool [H, W], true where grey takes the picture's place.
    """
    image = to_signed(pixels[None], device)
    image = image if hidden is None else image.masked_fill(hidden.to(device, non_blocking=True), 0.0)
    return in_parts(codec.encode, image, window, codec.factor, 1)


def encode_edit_input(
    codec: Codec, edit: EditInput, device: torch.device, window: int | None = None
) -> LatentEditInput:
    """A picture to work on in latents, in its style; `window` as in `encode_pixels`."""
    latents = encode_pixels(codec, edit.pixels, device, window)
    if edit.style is not None:
        latents = adain(latents, encode_pixels(codec, edit.style, device, window), edit.style_strength)
    mask = masked = None
    if edit.mask is not None:
        mask = latent_mask(edit.mask, codec.factor).to(device, non_blocking=True)
        masked = encode_pixels(codec, edit.pixels, device, window, edit.mask)
    return LatentEditInput(latents, mask, masked, edit.strength)
