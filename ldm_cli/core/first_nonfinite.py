"""Which module of a computation gave the first value that is not finite: found by computing once more, and watching.

Nothing is watched while all is well, so that no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from ldm_cli.core.compiling import eagerly


def first_nonfinite(modules: Mapping[str, nn.Module], compute: Callable[[], object]) -> str:
    """Where a computation first has a value that is not finite, for a message.

    Args:
        modules: the networks that take part, by name.
        compute: the computation, which is done again.

    Returns:
        `the output of unet.conv_in`, `the input of vae.decoder.conv_in`; empty if no module has such a value.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            # Of nested modules the inner one returns first.
            if not found and not _is_finite(output):
                found.append(f"the {'output' if _is_finite(inputs) else 'input'} of {name}")

        return look

    with ExitStack() as stack:
        stack.enter_context(eagerly())
        for root, network in modules.items():
            for name, module in network.named_modules(prefix=root):
                stack.callback(module.register_forward_hook(hook(name)).remove)
        with suppress(RuntimeError):  # it was to be found where the values come from, not to succeed
            compute()
    return found[0] if found else ""


def _is_finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of floats in a value, however nested."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
