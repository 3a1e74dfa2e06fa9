"""Gradients summed over the ranks while backward still computes others (Li et al. 2020, "PyTorch Distributed",
section 3.2, arXiv:2006.15704)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm_cli.training.ranks import Ranks

TensorT = TypeVar("TensorT", bound=Tensor)

_BUCKET_SIZE = 2**23
"""Numbers per all-reduce: 32 MiB in float32."""


class GradientBuckets:
    """Flat buckets, of which `.grad` of each parameter is a view.

    In the last backward pass of a step, the all-reduce of a bucket starts as soon as its gradients are there. Buckets
    start in the same order on all ranks, and their layout is fixed, so that neither the order in which gradients
    arrive nor the time they take changes a bit of the sum.

    Args:
        parameters: of one dtype and device, in the order of the forward pass, of which backward is the reverse. In each
            step a parameter has a gradient on all ranks or on none; without one its `.grad` stays None.
        ranks: the processes that hold the same parameters. One process needs no buckets.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self._ranks = ranks
        backwards = list(parameters)[::-1] if ranks.world_size > 1 else []
        self._buckets = [_Bucket(members) for members in in_buckets(backwards)]
        self._under_way: list[Callable[[], None]] = []
        self._passes_left = 0
        for bucket in self._buckets:
            for parameter, view in bucket.views:
                hook = partial(self._collect, bucket, view)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def begin(self, num_passes: int) -> None:
        """Begin a step of so many backward passes; no parameter has a gradient."""
        self._passes_left, self._under_way = num_passes, []
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.views)

    def end_pass(self) -> None:
        """End a backward pass."""
        self._passes_left -= 1

    def finish(self) -> None:
        """Wait until the sums of all buckets are in `.grad`.

        Raises:
            WorkerError: another rank failed or is gone.
        """
        for bucket in self._buckets[len(self._under_way) :]:
            self._start(bucket)  # its parameters without a gradient ignore their part of the sum
        for wait in self._under_way:
            wait()

    def _collect(self, bucket: _Bucket, view: Tensor, parameter: Tensor) -> None:
        if parameter.grad is not view and parameter.grad is not None:
            view.copy_(parameter.grad)
            parameter.grad = view
        if self._passes_left != 1:
            return
        bucket.num_missing -= 1
        for ready in self._buckets[len(self._under_way) :]:
            if ready.num_missing:
                return
            self._start(ready)

    def _start(self, bucket: _Bucket) -> None:
        self._under_way.append(self._ranks.begin_sum(bucket.flat))


class _Bucket:
    """Gradients side by side in memory.

    Attributes:
        views: each parameter and its place in `flat`, with the strides of the parameter, as fused AdamW wants them.
        num_missing: gradients that are still to come in this step.
    """

    def __init__(self, members: list[nn.Parameter]) -> None:
        self.flat = torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype, device=members[0].device)
        places = torch.split(self.flat, [p.numel() for p in members])
        self.views = [
            (p, place.as_strided(p.shape, p.stride(), place.storage_offset()))
            for p, place in zip(members, places, strict=True)
        ]
        self.num_missing = len(members)


def in_buckets(tensors: Iterable[TensorT]) -> Iterator[list[TensorT]]:
    """The tensors in order, in groups of at most `_BUCKET_SIZE` numbers or of one tensor."""
    bucket: list[TensorT] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > _BUCKET_SIZE:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
