"""Models compiled by torch in place: weights and the keys of a state dict stay as they are.

Training compiles region by region, because the backward pass doubles the work of the compiler. A region is a block that
a model repeats; blocks of the same shapes share their code. Sampling compiles the whole model, so that a step runs less
Python. Every shape of input has code of its own: results for one shape never depend on the shapes that came before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ldm_cli.storage import user_cache

NOTICE = "torch compiles the model as it first runs: minutes at the first start, seconds later"
_MOST_SHAPES = 1024
"""Of one kind of block; torch's own limit is 8, beyond which it would no longer compile."""


class Region(nn.Module):
    """A module that is compiled as a whole, without calls back to Python."""


def compile_regions(model: nn.Module) -> None:
    """Compile every region of a model when it first runs, and again for each shape; none lies in another one.

    Code is kept between processes in the user's cache, unless TORCHINDUCTOR_CACHE_DIR says where.
    """
    compile_whole(*(module for module in model.modules() if isinstance(module, Region)))


def compile_whole(*modules: nn.Module) -> None:
    """Compile each of some modules as one; all else as in `compile_regions`."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "compiled"))
    torch._dynamo.config.recompile_limit = _MOST_SHAPES
    torch._dynamo.config.accumulated_recompile_limit = _MOST_SHAPES
    for module in modules:
        module.compile(dynamic=False, fullgraph=True)


@contextmanager
def eagerly() -> Iterator[None]:
    """Within, nothing is compiled and compiled regions run as if they were not: what runs once is not worth it."""
    if "torch._dynamo" not in sys.modules:  # torch's compiler takes seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
