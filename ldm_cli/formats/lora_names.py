"""The names that files of adapters have for the modules of a model, whatever the model is.

A file names a module by its path (diffusers, PEFT) or by its path with `_` in place of `.` (kohya), the path being that
of a model folder or of a single file. So all names of a model follow from its tensors, and are looked up with `_`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_cli.formats.pipeline_folder import TEXT_ENCODER
from ldm_cli.formats.single_file_layout import KINDS, PLACES
from ldm_cli.formats.single_file_names import Form, place_of

# What diffusers put around the modules of attention before version 0.22.
_PROCESSOR = re.compile(r"\.processor\.(to_\w+)_lora$")

# The modules of a block in the order in which cloneofsimo's lora_diffusion numbers them: that of diffusers 0.11 and of
# transformers.
_NUMBERED = {
    "attn1.to_q": (
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj"),
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    ),
    "self_attn.k_proj": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"),
}


@dataclass(frozen=True)
class Adaptable:
    """A model whose weights adapters change.

    Attributes:
        tensors: its state dict, on any device.
        config: content of its complete config.json.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    def weight(self, module: str) -> Tensor:
        """The weight of a linear layer or convolution."""
        return self.tensors[f"{module}.weight"]


@dataclass(frozen=True)
class Target:
    """The module that a name means.

    Attributes:
        module: its path.
        form: which rows of the named update it takes, where those of a single file's module are not its own: see
            `Place`.
    """

    component: str
    module: str
    form: Form = "same"


class ModuleNames:
    """All names that files may have for the modules of some models, by component."""

    def __init__(self, models: Mapping[str, Adaptable]) -> None:
        self._targets: dict[str, list[Target]] = {}
        for component, model in models.items():
            own: dict[str, dict[Target, None]] = {}
            for path, target in _paths(component, model):
                own.setdefault(path.replace(".", "_"), {})[target] = None
            for number, module in enumerate(_numbered(model)):
                self._targets[f"{component}:{number}"] = [Target(component, module)]
            for prefix in _prefixes(component):
                for path, targets in own.items():
                    self._targets.setdefault(prefix + path, list(targets))

    def targets(self, name: str) -> list[Target]:
        """The modules that a name in a file means; none if it is unknown."""
        name = _PROCESSOR.sub(lambda found: f".{found[1]}", name)
        return self._targets.get(name.replace(".", "_"), [])


def kohya_prefix(component: str, components: Mapping[str, object]) -> str:
    """What kohya's names of a component begin with; several text encoders are numbered."""
    if not component.startswith(TEXT_ENCODER):
        return "lora_unet"
    is_alone = not any(name.startswith(f"{TEXT_ENCODER}_") for name in components)
    return "lora_te" if is_alone else f"lora_te{_number(component)}"


def _numbered(model: Adaptable) -> Iterator[str]:
    """The modules that files number, in order; the middle of a U-Net comes last."""
    modules = [name.removesuffix(".weight") for name in model.tensors if name.endswith(".weight")]
    for module in sorted(modules, key=lambda module: module.startswith("mid_block")):
        for first, layers in _NUMBERED.items():
            if module.endswith(f".{first}"):
                yield from (module.removesuffix(first) + layer for layer in layers)


def _number(text_encoder: str) -> str:
    return text_encoder.removeprefix(TEXT_ENCODER).lstrip("_") or "1"


def _prefixes(component: str) -> Iterator[str]:
    """What precedes a module's path, with `_`; a file of one model may leave out which it is."""
    if component.startswith(TEXT_ENCODER):
        number = _number(component)
        own = ["lora_te_"] if number == "1" else []
        own += [f"lora_te{number}_", f"{component}_"]
    else:
        own = ["lora_unet_", f"lora_{component}_", f"{component}_"]
    yield from (*own, "lycoris_", "base_model_model_", "")


def _paths(component: str, model: Adaptable) -> Iterator[tuple[str, Target]]:
    """Every path that means a module, and the module."""
    table = next((KINDS[kind].table(model.config) for place, _, kind in PLACES if place == component), {})
    for name, tensor in model.tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or tensor.ndim not in (2, 4):
            continue
        target = Target(component, module)
        yield module, target
        yield module.removeprefix("text_model."), target
        if module.endswith(".to_out.0"):
            yield module.removesuffix(".0"), target
        if (place := place_of(name, table)) is not None:
            # An update has the shape of the layer, however the single file lays its weight out.
            form = "same" if place.form in ("convolution", "transposed") else place.form
            yield re.sub(r"[._]weight$", "", place.path), Target(component, module, form)
