"""torch's AdamW without torch's compiler, which its optimizers import at their first step so as to keep out of compiled
code: 1.3 s at the start of every training. Nothing here calls an optimizer from compiled code."""

from __future__ import annotations

import inspect
from typing import Any

import torch

_DISABLED = "__dynamo_disable"  # where torch._disable_dynamo remembers what the compiler has made of a function


def _leave_compiler_out() -> None:
    """Say of the methods of all optimizers that they have been dealt with."""
    for method in vars(torch.optim.Optimizer).values():
        plain = inspect.unwrap(method) if inspect.isfunction(method) else method
        if plain is not method and not hasattr(plain, _DISABLED):
            setattr(plain, _DISABLED, plain)


_leave_compiler_out()


class AdamW(torch.optim.AdamW):
    """Loshchilov & Hutter 2019, arXiv:1711.05101; arguments as torch's."""

    step: Any = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
