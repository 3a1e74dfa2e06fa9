"""Weights of which each rank holds a part (Rajbhandari et al. 2020, "ZeRO", stage 3, arXiv:1910.02054), through
`torch.distributed.fsdp.fully_shard`.

Every parameter is cut along its first dimension, one part per rank. The ranks gather a block of a model before it runs
and free it afterwards; they add up and cut its gradients as soon as backward has computed them. Optimizer and averages
work on plain tensors, the rank's parts.

Discriminators and other auxiliary modules, and scalars, are small and stay replicated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ldm_cli.training.ranks import Ranks
from ldm_cli.training.weights import Weights

_UNIT_SIZE = 2**24
"""A module with so many parameters, or more, is gathered on its own: 64 MiB in float32."""
_ENTRANCES = ("encode", "decode", "get_image_features", "get_text_features")
"""Methods beside `forward` that run a model, by their names in diffusers and transformers."""


class _Part(NamedTuple):
    name: str
    whole: DTensor
    """The module's parameter."""
    local: nn.Parameter
    """This rank's part of `whole`, in the same memory."""


class ShardedWeights(Weights):
    """The parameters of some modules, cut among the ranks.

    Args:
        modules: are sharded. They come on the CPU; block after block goes to the device and is cut there.
        auxiliary: stay replicated.
        ranks: two or more.

    Raises:
        ValueError: a parameter has two names.
    """

    is_sharded = True

    def __init__(
        self, modules: Mapping[str, nn.Module], auxiliary: Mapping[str, nn.Module], device: torch.device, ranks: Ranks
    ) -> None:
        super().__init__(auxiliary, ranks)
        _expect_one_name_each([*modules.values(), *auxiliary.values()])
        self._modules, self._device = modules, device
        self._twins = {name: _twin(module) for name, module in modules.items()}
        mesh = DeviceMesh.from_group(ranks.device_group(), device.type)
        for module in modules.values():
            _shard(module, mesh, device, ranks)
        self._parts = {name: [_part(n, p) for n, p in m.named_parameters() if p.ndim] for name, m in modules.items()}
        self._of = {id(part.local): part for parts in self._parts.values() for part in parts}
        sharded: dict[str, dict[str, nn.Parameter]] = {}
        for name, module in modules.items():
            local = {part.name: part.local for part in self._parts[name]}
            sharded[name] = {n: local.get(n, parameter) for n, parameter in module.named_parameters()}
        self.parameters = sharded | self.parameters

    def replicas(self) -> list[nn.Parameter]:
        """Scalars, and the parameters of auxiliary modules."""
        return [parameter for parameter in super().replicas() if id(parameter) not in self._of]

    def take_local_gradients(self) -> None:
        """The gradients of parts are sums over the ranks already."""
        for part in self._of.values():
            if part.whole.grad is not None:
                gradient: Any = part.whole.grad
                part.local.grad, part.whole.grad = gradient.to_local(), None

    def grad_norm(self, module: str) -> Tensor:
        """The norm of the norms of all parts, in the order of the ranks: the same bits on each of them."""
        replicas = {id(parameter) for parameter in self.replicas()}
        cut, common = (
            torch.nn.utils.get_total_norm(
                [
                    p.grad
                    for p in self.parameters[module].values()
                    if p.grad is not None and (id(p) in replicas) == is_common
                ]
            ).to(self._device)
            for is_common in (False, True)
        )
        norm: Tensor = torch.linalg.vector_norm(torch.cat([self.ranks.gathered(cut[None]), common[None]]))
        return norm

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within, the modules of rank 0 are plain ones with their full weights; all ranks enter.

        Rank 0 needs memory for them on the device, the other ranks for one parameter at a time.
        """
        for name, parts in self._parts.items():
            for part in parts:
                value = self._gathered(part)
                if self.ranks.is_first:
                    _put(self._twins[name], part.name, value)
        with self._twins_in_place() if self.ranks.is_first else _nothing():
            yield

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within, the modules of every rank are plain ones on the CPU, ready to load full weights; at the end each rank
        keeps its parts of them."""
        for name, parts in self._parts.items():
            for part in parts:
                _put(self._twins[name], part.name, torch.empty(part.whole.shape, dtype=part.whole.dtype))
        with self._twins_in_place():
            yield
            with torch.no_grad():
                for name, parts in self._parts.items():
                    for part in parts:
                        held = self._modules[name].get_parameter(part.name)
                        part.local.copy_(self.local_part(part.local, held.detach()))

    def as_distributed(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """A DTensor where this rank holds a part of `parameter`."""
        part = self._of.get(id(parameter))
        if part is None:
            return value
        whole = part.whole
        return DTensor.from_local(
            value, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def local_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of `value`, which is a full tensor or a DTensor and belongs to `parameter`."""
        if isinstance(value, DTensor):
            local: Tensor = value.to_local()
            return local
        if id(parameter) not in self._of:
            return value
        pieces = value.chunk(self.ranks.world_size)  # as fully_shard cuts; there may be fewer than ranks
        return pieces[self.ranks.rank] if self.ranks.rank < len(pieces) else value[:0]

    def _gathered(self, part: _Part) -> Tensor:
        """A full parameter, gathered from the parts of all ranks."""
        length = -(-part.whole.shape[0] // self.ranks.world_size)
        padded = part.local.new_zeros(length, *part.whole.shape[1:])
        padded[: len(part.local)] = part.local.detach()
        return self.ranks.gathered(padded)[: part.whole.shape[0]]

    @contextmanager
    def _twins_in_place(self) -> Iterator[None]:
        """Within, the modules are their plain twins, without the hooks of `fully_shard`; at the end the twins' weights
        are freed."""
        self._swap()
        try:
            yield
        finally:
            self._swap()
            for name, parts in self._parts.items():
                for part in parts:
                    _put(self._twins[name], part.name, torch.empty(part.whole.shape, device="meta"))

    def _swap(self) -> None:
        # The task holds references to the modules, so the modules stay and exchange their content with the twins.
        for name, module in self._modules.items():
            twin = self._twins[name]
            module.__class__, twin.__class__ = twin.__class__, module.__class__
            module.__dict__, twin.__dict__ = twin.__dict__, module.__dict__


def _twin(module: nn.Module) -> nn.Module:
    """A copy without weights, which shares the module's buffers and scalars."""
    weights = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) if p.ndim else p
        for p in module.parameters()
    }
    return copy.deepcopy(module, {**weights, **{id(buffer): buffer for buffer in module.buffers()}}).eval()


def _expect_one_name_each(modules: Sequence[nn.Module]) -> None:
    """Make sure that no parameter is shared: `fully_shard` refuses that, and twins are filled by name.

    Raises:
        ValueError: two names stand for one parameter.
    """
    named = [(n, p) for module in modules for n, p in module.named_parameters(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, parameter in named:
        if first.setdefault(id(parameter), name) != name:
            raise ValueError(f"ShardedWeights: '{name}' and '{first[id(parameter)]}' are one parameter")


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _part(name: str, parameter: nn.Parameter) -> _Part:
    whole: Any = parameter
    return _Part(name, whole, nn.Parameter(whole.to_local().detach(), requires_grad=parameter.requires_grad))


def _shard(module: nn.Module, mesh: DeviceMesh, device: torch.device, ranks: Ranks) -> None:
    """Cut a model into units, the innermost first; the rest of it is one more unit."""
    scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    for scalar in scalars:
        scalar.data = scalar.data.to(device)

    def cut(unit: nn.Module) -> None:
        fully_shard(unit, mesh=mesh, ignored_params=scalars)
        assert isinstance(unit, FSDPModule)
        # Gradients are sums everywhere: the optimizer step divides once, by the number of parts.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if device.type == "cpu":
            unit.set_custom_all_gather(_WatchedAllGather(ranks))  # type: ignore[arg-type]  # its base is private
            unit.set_custom_reduce_scatter(_WatchedReduceScatter(ranks))  # type: ignore[arg-type]

    def visit(inner: nn.Module) -> int:
        """Cut the units within `inner`; returns the number of its parameters outside of them."""
        size = sum(p.numel() for p in inner.parameters(recurse=False)) + sum(map(visit, inner.children()))
        is_layer = not any(True for _ in inner.children())
        if inner is module or is_layer or isinstance(inner, nn.ModuleList | nn.ModuleDict) or size < _UNIT_SIZE:
            return size
        cut(inner)
        return 0

    visit(module)
    cut(module)
    for name in _ENTRANCES:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


class _Watched:
    """A collective of `fully_shard` through gloo that ends with an error when another rank is gone."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the input or output."""
        return torch.empty(*size, dtype=dtype, device=device)


class _WatchedAllGather(_Watched):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        pieces = list(output_tensor.chunk(self._ranks.world_size))
        self._ranks.complete(lambda: dist.all_gather(pieces, input_tensor, group=group, async_op=True), output_tensor)


class _WatchedReduceScatter(_Watched):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        pieces = list(input_tensor.chunk(self._ranks.world_size))
        self._ranks.complete(
            lambda: dist.reduce_scatter(output_tensor, pieces, op=op, group=group, async_op=True), output_tensor
        )
