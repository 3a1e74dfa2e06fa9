"""How many rows go through a network at once.

On a CPU a picture depends on its prompt and seed alone, bit for bit. There the result of a row may depend on how many
rows there are (libraries choose kernels and orders of addition by the whole shape), but neither on which row it is nor
on the content of the others. So the number of images per call follows from their size alone, and the last call is
filled up: to that number, or to a smaller one for which a trial gives the same bits.

Small images gain from company: a U-Net of 12.6 M parameters takes 20 ms per row of 16×16 latents with 2 rows, 12.7 with
8, 11.3 with 16 and 10.5 with 32 (2 threads). Large images gain nothing: they run one by one. Tokens are always small:
a Transformer of 2 M parameters takes 0.92 s for 32 pictures of 64 tokens with 8 rows, 0.60 with 16, 0.50 with 32
(1 thread).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DENOISED_PIXELS = 2048
DECODED_PIXELS = 16384
_MOST_TEXTS_OFF_CPU = 64
_MOST_IMAGES = 8
TOKEN_ROWS = 16


def images_per_call(pixels_per_call: int, num_pixels: int) -> int:
    """Images of `num_pixels` pixels, as the network sees them, in a call on a CPU.

    Args:
        pixels_per_call: of all of them: `DENOISED_PIXELS` or `DECODED_PIXELS`.
        num_pixels: of one image.
    """
    return max(1, min(_MOST_IMAGES, pixels_per_call // num_pixels))


def row_groups(
    num_images: int,
    images_on_cpu: int,
    device: torch.device,
    most: int,
    enough: Callable[[int, int], int] | None = None,
) -> Iterator[tuple[slice, int]]:
    """The images of each call of a network, and how many rows to give it: on a CPU a function of the image size.

    Args:
        images_on_cpu: images per call on a CPU: `images_per_call`, or `TOKEN_ROWS`.
        device: of the network. Off the CPU there are as many rows as images.
        most: images per call off the CPU.
        enough: (images of a call that is not full, images of a full one) → rows to compute, see `enough_rows`; None: a
            call is always filled up.
    """
    on_cpu = device.type == "cpu"
    size = images_on_cpu if on_cpu else most
    for start in range(0, num_images, size):
        count = min(size, num_images - start)
        rows = count
        if on_cpu and count < size:
            rows = size if enough is None else enough(count, size)
        yield slice(start, start + count), rows


def texts_per_call(device: torch.device) -> int:
    """Prompts per call of a text tower: on a CPU one, so that its states do not depend on other prompts."""
    return 1 if device.type == "cpu" else _MOST_TEXTS_OFF_CPU


def enough_rows(trial: Callable[[int], Tensor], count: int, size: int) -> int:
    """The least of `count`, 2, 4, 8 and `size` rows that give the first `count` results of `size` rows, bit for bit.

    Args:
        trial: number n of rows → results [n, …] for the first n of always the same images.
        count, size: 1 ≤ `count` < `size`.
    """
    expected = trial(size)[:count]
    candidates = (rows for rows in sorted({count, 2, 4, 8}) if count <= rows < size)
    return next((rows for rows in candidates if torch.equal(trial(rows)[:count], expected)), size)


def filled(rows: Tensor, size: int) -> Tensor:
    """[N, …] with the last row repeated up to `size`, in new memory: alignment may decide the kernel."""
    return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])
