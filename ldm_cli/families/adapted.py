"""Adapters on the networks of a family: weights that change between pictures, and come back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm_cli.core.low_rank import WeightUpdate
from ldm_cli.families.family import Family
from ldm_cli.families.lora_reader import Adapters
from ldm_cli.formats.lora_names import Adaptable
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER


def adaptable_networks(family: Family) -> dict[str, nn.Module]:
    """The denoiser and the text towers, by subfolder."""
    towers = [name for name in family.components if name.startswith(TEXT_ENCODER)]
    models = getattr(family.encoder, "models", ())
    return {family.components[0]: family.denoiser, **dict(zip(towers, models, strict=True))}


def adaptable_models(networks: Mapping[str, nn.Module]) -> dict[str, Adaptable]:
    """What files of adapters may change in some networks, each with the configuration of a model folder."""
    return {
        name: Adaptable(network.state_dict(), getattr(network, "config").to_hugging_face())  # noqa: B009
        for name, network in networks.items()
    }


class AdaptedNetworks:
    """Networks with adapters that may be set, changed and taken off without reading the networks again.

    Weights are changed in place, so that compiled code sees them. Of each weight that adapters change, a copy is kept;
    with it the weight comes back bit for bit.
    """

    def __init__(self, networks: Mapping[str, nn.Module], adapters: Mapping[str, Adapters]) -> None:
        """Take no adapter yet.

        Args:
            networks: by component.
            adapters: by name; their components and modules are those of `networks`.
        """
        parameters = {
            (component, name): parameter
            for component, network in networks.items()
            for name, parameter in network.named_parameters()
        }
        self._updates: dict[str, list[tuple[nn.Parameter, WeightUpdate]]] = {}
        for name, components in sorted(adapters.items()):
            self._updates[name] = [
                (weight, update.to(weight.device))
                for component, modules in components.items()
                for module, update in modules.items()
                for weight in [parameters[component, f"{module}.weight"]]
            ]
        self._base: dict[nn.Parameter, Tensor] = {}
        self._scales: dict[str, float] = {}

    @torch.no_grad()
    def use(self, scales: Mapping[str, float]) -> None:
        """Set the weights to W + Σ s·Δ, in float32 and rounded once; adapters that are not named are taken off.

        Args:
            scales: s of each adapter, by name; 0: as if it were not named.
        """
        scales = {name: scale for name, scale in scales.items() if scale != 0.0}
        if scales == self._scales:
            return
        for weight, base in self._base.items():
            weight.copy_(base)
        updates: dict[nn.Parameter, list[tuple[WeightUpdate, float]]] = {}
        for name, own in self._updates.items():  # in one order, so that sums do not depend on that of `scales`
            for weight, update in own if name in scales else ():
                updates.setdefault(weight, []).append((update, scales[name]))
        self._base = {weight: weight.detach().clone() for weight in updates}
        for weight, parts in updates.items():
            weight.copy_(updated(self._base[weight], parts))
        self._scales = scales


def updated(weight: Tensor, parts: list[tuple[WeightUpdate, float]]) -> Tensor:
    """W + Σ s·Δ in float32, where several updates of one weight each begin at W."""
    base = weight.float()
    total = base.clone()
    for update, scale in parts:
        total += update.applied(base, scale) - base
    return total
