"""The exchange of a model's layers for those that are faster on a CPU."""

from __future__ import annotations

from torch import nn

from ldm_cli.core.cpu.convolution import TunedConv2d
from ldm_cli.core.cpu.group_norm import TunedGroupNorm
from ldm_cli.core.cpu.linear import TunedLinear
from ldm_cli.core.cpu.memory import keep_freed_memory
from ldm_cli.core.cpu.upsampling import TunedUpsample2D
from ldm_cli.core.models.layers import Upsample2D

_TUNED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TunedLinear,
    nn.Conv2d: TunedConv2d,
    nn.GroupNorm: TunedGroupNorm,
    Upsample2D: TunedUpsample2D,
}


def tune_for_cpu(model: nn.Module) -> None:
    """Give the layers of a model faster forward and backward passes, in place, if its parameters are on a CPU.

    Layers become subclasses of what they were. Parameters, names and hooks stay, and results agree up to rounding.
    Tuned layers run as plain ones under autocast, in torch.compile, on another device, and in types other than float32.
    The process also keeps the memory that it frees.

    Args:
        model: it may have been tuned before.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return
    keep_freed_memory()
    for module in model.modules():
        module.__class__ = _TUNED.get(type(module), type(module))
