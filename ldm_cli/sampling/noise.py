"""The noise of a picture: a function of its seed and the step alone, whatever is drawn with it and where."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.sampling.request import ImageRequest


def initial_noise(requests: Sequence[ImageRequest], shape: tuple[int, ...]) -> Tensor:
    """What sampling starts from, standard normal float32 [N, *shape]."""
    return torch.stack([_of_request(request, "sampling: initial noise", 0, shape) for request in requests])


def step_noise(requests: Sequence[ImageRequest], step: int, shape: tuple[int, ...]) -> Tensor:
    """What the sampler adds in step number `step`, standard normal float32 [N, *shape]."""
    return torch.stack([_of_request(request, "sampling: step noise", step, shape) for request in requests])


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
    if angle < 1e-4:
        return torch.lerp(a, b, weight)
    return (torch.sin((1.0 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)


def _of_request(request: ImageRequest, purpose: str, step: int, shape: tuple[int, ...]) -> Tensor:
    noise = _normal(request.seed, purpose, step, shape)
    if request.blend is None or request.blend.seed == request.seed:
        return noise
    return slerp(noise, _normal(request.blend.seed, purpose, step, shape), request.blend.weight)


def _normal(seed: int, purpose: str, step: int, shape: tuple[int, ...]) -> Tensor:
    zero, position = torch.zeros(1, dtype=torch.int64), torch.tensor([step])
    return philox.normal(philox.key(seed, purpose), zero, position, shape)[0]
