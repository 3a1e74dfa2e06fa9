"""Models compiled by torch in place: weights and the keys of a state dict stay as they are.

Training compiles region by region, because the backward pass doubles the work of the compiler. A region is a block that
a model repeats; blocks of the same shapes share their code. Sampling compiles the whole model, so that a step runs less
Python. Every shape of input has code of its own: results for one shape never depend on the shapes that came before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from ldm_cli.errors import first_line
from ldm_cli.storage import user_cache

NOTICE = "torch compiles the model as it first runs: minutes at the first start, seconds later"
_MOST_SHAPES = 1024
"""Of one kind of block; torch's own limit is 8, beyond which it would no longer compile."""


def should_compile(
    setting: bool | Literal["auto"], device: torch.device, pays_off: bool, tell: Callable[[str], None]
) -> bool:
    """Whether models are compiled.

    Args:
        setting: `auto` compiles on CUDA alone, if it pays off and torch's compiler works there.
        pays_off: whether the work is long enough for `auto`.
        tell: receives a line if models are compiled, or if `auto` cannot.
    """
    if setting == "auto":
        setting = device.type == "cuda" and pays_off
        if setting and (problem := compiler_problem(device)):
            tell(f"not compiled, which is slower: {problem}")
            return False
    if setting:
        tell(NOTICE)
    return setting


@cache
def compiler_problem(device: torch.device) -> str | None:
    """Why torch's compiler does not work on a device, in a line; None if it does, shown by a small function."""

    @torch.compile
    def square(x: Tensor) -> Tensor:
        return (x * x).sum()

    _keep_code()
    try:
        square(torch.ones(8, device=device, requires_grad=True)).backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # of a missing or unsuitable triton or C compiler; there are many kinds
        cause = getattr(error, "inner_exception", error)
        return f"{type(cause).__name__}: {first_line(cause)}"
    return None


class Region(nn.Module):
    """A module that is compiled as a whole, without calls back to Python."""


def compile_regions(model: nn.Module) -> None:
    """Compile every region of a model when it first runs, and again for each shape; none lies in another one.

    Code is kept between processes in the user's cache, unless TORCHINDUCTOR_CACHE_DIR says where.
    """
    compile_whole(*(module for module in model.modules() if isinstance(module, Region)))


def compile_whole(*modules: nn.Module, replayed: bool = False) -> None:
    """Compile each of some modules as one; all else as in `compile_regions`.

    Args:
        modules: in evaluation mode where they are replayed.
        replayed: their kernels are launched at once, as a CUDA graph for each shape of input. The next call writes into
            the output of this one: copy it.
    """
    _keep_code()
    torch._dynamo.config.recompile_limit = _MOST_SHAPES
    torch._dynamo.config.accumulated_recompile_limit = _MOST_SHAPES
    for module in modules:
        module.compile(dynamic=False, fullgraph=True, mode="reduce-overhead" if replayed else None)


def _keep_code() -> None:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "compiled"))


@contextmanager
def eagerly() -> Iterator[None]:
    """Within, nothing is compiled and compiled regions run as if they were not: what runs once is not worth it."""
    if "torch._dynamo" not in sys.modules:  # torch's compiler takes seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
