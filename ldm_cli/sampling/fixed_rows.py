"""How many images go through a network at once on a CPU: a picture depends on its prompt and seed alone.

What a network returns for one row depends on how many rows there are (oneDNN and MKL block by the whole
shape), but not on which row it is or what the others hold. Measured with torch 2.13 on a 6 M U-Net with
16×16 latents, 2 threads, 24 rows in groups of k: k = 1 differs from k = 2, 3, 4, 6, 8, 12, 24 by 1e-6
to 3e-6, and permuting the rows permutes the results, bit for bit, at every k. So the number of images
per call follows from the image size alone, and the last group is filled up. One image (2 rows) per call
would do too, but takes 330 ms for the 24 rows where 8 rows per call take 180 ms. Large images gain
nothing from company, and filling up would cost a lot: they run one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LATENT_PIXELS_PER_CALL = 1024
_IMAGE_PIXELS_PER_CALL = 16384
_MOST_PER_CALL = 8


def latents_per_call(height: int, width: int) -> int:
    """Latents of h×w per call of the denoiser: a function of their size alone."""
    return _per_call(_LATENT_PIXELS_PER_CALL, height * width)


def images_per_call(num_pixels: int) -> int:
    """Images of H·W pixels per call of the decoder: a function of their size alone."""
    return _per_call(_IMAGE_PIXELS_PER_CALL, num_pixels)


def _per_call(budget: int, num_pixels: int) -> int:
    return max(1, min(_MOST_PER_CALL, budget // num_pixels))


def filled(rows: Tensor, size: int) -> Tensor:
    """[N, …] with the last row repeated up to `size`, in new memory: alignment may decide a BLAS path."""
    return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])
