"""A simulated accelerator: the device `simulated`, whose tensors compute on the CPU, but may not meet a CPU tensor.

It notes each *touch* of the host: a copy between host and device, and a read that waits for the device (`.item()`,
`bool`, `nonzero`). A CPU tensor of one or more dimensions that meets a device tensor raises `DeviceMixError`. It can
show neither kernels, memory and compiled code, nor what CUDA does with pinned memory and streams.

torch must know the device before the first backward pass of a process, so a process of its own has it; `worker.py` says
what that does. torch's interface for it is private and experimental.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch import Tensor

NAME = "simulated"
IS_POSSIBLE = hasattr(registration, "_setup_privateuseone_for_python_backend")
_ROOT = Path(__file__).resolve().parents[2]
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "repeat_interleave"}
# What autocast computes in the lower precision; the rest follows the types of its operands.
_PRODUCTS = ("addmm", "baddbmm", "bmm", "conv2d", "linear", "matmul", "mm", "scaled_dot_product_attention")

touches: list[str] = []
"""`kind file:function` of each touch so far, file and function being the innermost ones of this repository."""


class DeviceMixError(RuntimeError):
    """A CPU tensor met a device tensor."""


class DeviceTensor(torch.Tensor):
    """A tensor of the device around one of the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        with torch.inference_mode(inner.is_inference()):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                layout=inner.layout,
                device=torch.device(NAME, 0),
            )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        """torch reads the storage itself, which is empty here."""
        _touch("read")
        return self.inner.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """For safetensors, which asks which tensors share memory."""
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = DeviceTensor(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied


def register() -> None:
    """Make torch know the device in this process, where `IS_POSSIBLE`."""
    torch.set_num_threads(1)
    registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    # `.data = …` would leave the inner tensor behind.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    kernels, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _keep.extend((kernels, others))
    kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in _PRODUCTS:
        kernels.impl(name, _in_lower_precision(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


_keep: list[torch.library.Library] = []


class _Module(registration._DummyBackendModule if IS_POSSIBLE else object):  # type: ignore[misc]
    """What torch asks of `torch.simulated`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _touch(kind: str) -> None:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if _is_of_the_repository(frame.f_code.co_filename):
            break
        frame = frame.f_back
    touches.append(f"{kind} {Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")


@cache
def _is_of_the_repository(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(_ROOT) and "site-packages" not in path.parts and path != Path(__file__)


def _inner(value: Any) -> Any:
    """An argument of an operator as the CPU takes it."""
    if isinstance(value, DeviceTensor):
        return value.inner
    return [_inner(entry) for entry in value] if isinstance(value, list | tuple) else value


def _outer(value: Any) -> Any:
    """What the CPU gave as a result of the device."""
    if isinstance(value, list | tuple):
        return type(value)(_outer(entry) for entry in value)
    return DeviceTensor(value) if isinstance(value, Tensor) and not isinstance(value, DeviceTensor) else value


def _host_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _host_tensors(value)
        elif isinstance(value, Tensor) and not isinstance(value, DeviceTensor):
            yield value


@cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operator writes to and returns, if it returns nothing else."""
    schema = func._schema
    if not all(value.alias_info and value.alias_info.is_write for value in schema.returns):
        return []
    return [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator gives for arguments of which at least one is on the device."""
    # In inference mode nothing has taken composite operators apart yet.
    if _is_composite(func) and (result := func.decompose(*args, **kwargs)) is not NotImplemented:
        return result
    name = func._schema.name.removeprefix("aten::")
    if name in ("copy_", "_to_copy"):
        return (_copied if name == "copy_" else _converted)(*args, **kwargs)
    if name in _READS:
        _touch("read")
    _refuse_mixtures(func, name, args, kwargs)
    to_device = "device" not in kwargs or _is_here(kwargs["device"])
    if _is_here(kwargs.get("device")):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*_inner(args), **{name: _inner(value) for name, value in kwargs.items()})
    if result is not None and (written := _written(func)):
        given = [kwargs[argument] if argument in kwargs else args[i] for i, argument in written]
        return given[0] if len(given) == 1 else tuple(given)
    return _outer(result) if to_device else result


def _refuse_mixtures(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    host = list(_host_tensors((args, *kwargs.values())))
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indexes = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) or not isinstance(index, DeviceTensor) for index in indexes):
            _touch("read")  # CUDA counts the elements, or copies the index
        host = [t for t in host if all(t is not index for index in indexes)]
    if any(t.ndim for t in host):
        raise DeviceMixError(f"{func}: a CPU tensor of shape {[tuple(t.shape) for t in host]} meets a device tensor")


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, DeviceTensor) != isinstance(source, DeviceTensor):
        _touch_copy(isinstance(target, DeviceTensor), non_blocking)
    _inner(target).copy_(_inner(source))
    return target


def _converted(source: Tensor, *, non_blocking: bool = False, device: Any = None, **kwargs: Any) -> Tensor:
    """`Tensor.to`."""
    is_here, goes_here = isinstance(source, DeviceTensor), device is None or _is_here(device)
    if is_here != goes_here:
        _touch_copy(goes_here, non_blocking)
    kwargs.pop("pin_memory", None)
    converted = torch.ops.aten._to_copy(_inner(source), **kwargs)
    return DeviceTensor(converted) if goes_here else converted


def _touch_copy(to_device: bool, non_blocking: bool) -> None:
    _touch(("send" if to_device else "fetch") + ("" if non_blocking else ", blocking"))


def _empty(
    size: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    return DeviceTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return _copied(target, source, non_blocking)


def _in_lower_precision(func: Any) -> Callable[..., Any]:
    def computed(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)

        def cast(value: Any) -> Any:
            is_cast = isinstance(value, DeviceTensor) and value.is_floating_point()
            return value.to(dtype) if is_cast else value

        without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(without):
            return func(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return computed
