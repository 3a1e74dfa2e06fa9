"""How many images go through a network at once on a CPU: a picture depends on its prompt and seed alone.

What a network returns for one row may depend on how many rows there are (BLAS libraries block by the whole shape), but
not on which row it is or what the others hold. So the number of images per call follows from the image size alone, and
the last group is filled up: to that number, or to a smaller one that gives the same bits here, which `enough` finds
out.

Company pays while images are small: a U-Net of 12.6 M parameters takes 20 ms per row of 16×16 latents with 2 rows, 12.7
with 8, 11.3 with 16 and 10.5 with 32 (2 threads). Large images gain nothing: they run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.sampling.groups import by_one_thread

_LATENT_PIXELS_PER_CALL = 2048
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


def trial(
    unet: UNet2DConditionModel,
    size: int,
    latent_size: tuple[int, int],
    context_shape: tuple[int, int],
    halves: Collection[int],
) -> Callable[[int], list[Tensor]]:
    """What `enough` asks of a U-Net: its predictions for the first n of `size` random images.

    Args:
        unet: on a CPU.
        size: images at most.
        latent_size: h and w.
        context_shape: L and D of a prompt's states.
        halves: rows per image of the calls that will be made: 1, 2 (both sides of guidance), or both.
    """
    dtype, random = next(unet.parameters()).dtype, torch.Generator().manual_seed(0)
    x = torch.randn(size, unet.config.in_channels, *latent_size, generator=random).to(dtype)
    contexts = torch.randn(2, size, *context_shape, generator=random).to(dtype)

    @torch.inference_mode()
    def outputs(n: int) -> list[Tensor]:
        results: list[Tensor] = []
        for rows in sorted(halves):
            context = contexts[:rows, :n].flatten(0, 1)
            results += unet(torch.cat([x[:n]] * rows), torch.full((1,), 500.0), context).chunk(rows)
        return results

    return outputs


def enough(outputs: Callable[[int], list[Tensor]], count: int, size: int, *, alone: bool = False) -> int:
    """How many images to give to a network so that `count` of them come out as they do among `size`, bit for bit.

    Which kernels run, and in which order they add, is decided by shapes and not by values: one call of each number on
    random input shows whether they agree.

    Args:
        outputs: number n of images → results [n, …] of every kind of call that will be made, for the first n of
            always the same images.
        count, size: 1 ≤ `count` ≤ `size`.
        alone: whether one thread is to do it, for the same as all threads do among `size`.

    Returns:
        The least of `count`, the powers of two above it and `size` that will do. Alone, 0 if none does.
    """
    fewer = [n for n in sorted({count, 2, 4}) if count <= n < size]
    tried = [*fewer, size] if alone else fewer
    whole = [result[:count] for result in outputs(size)] if tried else []
    for n in tried:
        results = by_one_thread(partial(outputs, n)) if alone else outputs(n)
        if all(torch.equal(a, b[:count]) for a, b in zip(whole, results, strict=True)):
            return n
    return 0 if alone else size


def filled(rows: Tensor, size: int) -> Tensor:
    """[N, …] with the last row repeated up to `size`, in new memory: alignment may decide a BLAS path."""
    return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])
