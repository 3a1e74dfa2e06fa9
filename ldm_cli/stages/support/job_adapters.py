"""The adapters of a job's pictures, on the networks of its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm_cli.families.adapted import AdaptedNetworks, adaptable_models, adaptable_networks
from ldm_cli.families.family import Family
from ldm_cli.formats.lora_reader import lora_sha256, read_lora
from ldm_cli.pictures.job import Item


class JobAdapters:
    """Every file of adapters that a job uses, read once.

    Attributes:
        paths: of the files, by name.
        sha256: of the files, by name.
    """

    def __init__(self, family: Family, items: Sequence[Item], paths: Mapping[str, Path]) -> None:
        """Read the files that some pictures use, of those in `paths`; errors as in `read_lora`."""
        names = sorted({name for item in items for name, _ in item.loras})
        self.paths = {name: paths[name] for name in names}
        self.sha256 = {name: lora_sha256(path) for name, path in self.paths.items()}
        networks = adaptable_networks(family) if names else {}
        models = adaptable_models(networks)
        self._networks = AdaptedNetworks(networks, {n: read_lora(path, models) for n, path in self.paths.items()})

    def use_for(self, item: Item) -> None:
        """Set the weights of the networks for one picture, and all others with its adapters."""
        self._networks.use(dict(item.loras))
