"""The noise of a picture: a function of its seed and the step alone, whatever else is generated with it.

It is computed on the device of the networks. The random integers are the same on all devices; the normal numbers that
are made of them differ by the rounding of log and cos.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.diffusion.samplers import NoiseSource
from ldm_cli.core.window import Window
from ldm_cli.sampling.request import Requests

_SEGMENT = 64  # pixels of a row whose noise is computed together


def initial_noise(requests: Requests, shape: tuple[int, ...], device: torch.device, of: str = "sampling") -> Tensor:
    """What sampling starts from, standard normal float32 [N, *shape]; `of` names what is sampled."""
    return _noise_source(requests, f"{of}: initial noise", shape, device)(0)


def step_noise(requests: Requests, shape: tuple[int, ...], device: torch.device, of: str = "sampling") -> NoiseSource:
    """What a sampler adds in each step: step number → standard normal float32 [N, *shape]; `of` as above."""
    return _noise_source(requests, f"{of}: step noise", shape, device)


def noise_of_window(
    seeds: Sequence[int], purpose: str, shape: tuple[int, int, int], window: Window, device: torch.device
) -> NoiseSource:
    """A part of the noise of pictures, by step: standard normal float32 [N, C, H', W'].

    It is computed by itself, and the same as it is in the noise of the whole.

    Args:
        seeds: one for each of the N pictures.
        purpose: of the noise.
        shape: (C, H, W) of the whole.
        window: the part, H' × W'.
    """
    channels, height, width = shape
    first, last = window.left // _SEGMENT, -(-(window.left + window.width) // _SEGMENT)
    channel, row, segment = (
        torch.arange(start, end, device=device)
        for start, end in ((0, channels), (window.top, window.top + window.height), (first, last))
    )
    place = (channel[:, None, None] * height + row[:, None]) * -(-width // _SEGMENT) + segment
    words = torch.tensor([philox.key(seed, purpose) for seed in seeds]).to(device, non_blocking=True)
    first_word, second_word = words.repeat_interleave(place.numel(), dim=0)[..., None].unbind(1)
    position = place.flatten().repeat(len(seeds))

    def noise(step: int) -> Tensor:
        segments = philox.normal((first_word, second_word), torch.full_like(position, step), position, (_SEGMENT,))
        rows = segments.view(len(seeds), channels, window.height, -1)
        return rows[..., window.left - first * _SEGMENT :][..., : window.width]

    return noise


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The point between a (weight 0) and b (weight 1) on the arc that joins them, of their shape.

    A mean of two Gaussian noises has less variance than either; this has theirs (Shoemake 1985,
    doi:10.1145/325334.325242; White 2016, arXiv:1609.04468).

    Args:
        a, b: of one shape, each one point.
        weight: 0 … 1; both ends are exact.
    """
    if weight in (0.0, 1.0):
        return b if weight else a
    cosine = (a.flatten() @ b.flatten()) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    arc = (torch.sin((1.0 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
    return torch.where(angle < 1e-4, torch.lerp(a, b, weight), arc)


def _noise_source(requests: Requests, purpose: str, shape: tuple[int, ...], device: torch.device) -> NoiseSource:
    """The noise of all requests, by step; what it takes from the host goes to the device here, once."""
    blends = {i: r.blend for i, r in enumerate(requests) if r.blend is not None and r.blend.seed != r.seed}
    seeds = [*(request.seed for request in requests), *(blend.seed for blend in blends.values())]
    words = torch.tensor([philox.key(seed, purpose) for seed in seeds]).to(device, non_blocking=True)
    key, epoch = words[..., None].unbind(1), torch.zeros_like(words[:, 0])

    def noise(step: int) -> Tensor:
        rows = philox.normal((key[0], key[1]), epoch, torch.full_like(epoch, step), shape)
        for (i, blend), other in zip(blends.items(), rows[len(requests) :], strict=True):
            # Copies: in place, alignment might decide the order of the sums.
            rows[i] = slerp(rows[i].clone(), other.clone(), blend.weight)
        return rows[: len(requests)]

    return noise
