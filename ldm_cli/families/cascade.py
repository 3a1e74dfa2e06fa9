"""A cascade: a model that generates small pictures, and models that enlarge them (Ho et al. 2021, arXiv:2106.15282)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ldm_cli.core.codec import PixelCodec
from ldm_cli.errors import CheckpointError
from ldm_cli.families.family import Family, ImageGenerator
from ldm_cli.families.latent_diffusion import pipeline_of
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.families.unclip import UnCLIP
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.model_source import read_model_json
from ldm_cli.formats.pipeline_folder import DIFFUSERS_VERSION, INDEX_NAME

_CLASS, _STAGES = "CascadePipeline", "stages"


@dataclass(frozen=True)
class Stage:
    """One model of a cascade.

    Attributes:
        settings: how it samples, as JSON.
    """

    name: str
    family: Family
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Cascade(ImageGenerator):
    """Models that work one after the other; each lies in a subfolder that the pipelines of diffusers open.

    Attributes:
        stages: the first generates pictures, each other one enlarges them.
        codec: of the result: pixels.
        folder: where it was read; None if it was not.
    """

    stages: tuple[Stage, ...]
    codec: PixelCodec
    folder: Path | None = None
    is_compiled: bool = False

    components: ClassVar[tuple[str, ...]] = ()

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """See `ImageGenerator`; `base.unet` is the U-Net of the stage `base`."""
        found = {stage.name: stage.family.weights_sha256 for stage in self.stages}
        return {f"{name}.{component}": sha for name, own in found.items() for component, sha in own.items()}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.stages[0].family.device

    @property
    def factor(self) -> int:
        """Pixels of the result per pixel of the first stage, along each side."""
        product = 1
        for stage in self.stages[1:]:
            assert stage.family.low_resolution is not None  # open_folder's own check
            product *= stage.family.low_resolution.factor
        return product

    @property
    def sample_size(self) -> tuple[int | None, int | None]:
        """Height and width of the result at the size that the first stage was trained at, in pixels."""
        base = self.stages[0].family
        height, width = (None if side is None else side * base.codec.factor * self.factor for side in base.sample_size)
        return height, width

    def save(self, folder: Path) -> None:
        """See `ImageGenerator`."""
        for stage in self.stages:
            stage.family.save(folder / stage.name)
        write_stages(folder, {stage.name: stage.settings for stage in self.stages})


def write_stages(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the index of a cascade: the settings of its stages by their subfolders, in order.

    Raises:
        StorageError: writing failed.
    """
    content = {"_class_name": _CLASS, "_diffusers_version": DIFFUSERS_VERSION, _STAGES: settings}
    write_json(folder / INDEX_NAME, content)


def is_mine(folder: Path) -> bool:
    """Whether the folder holds a cascade."""
    return pipeline_of(folder) == _CLASS


def open_folder(folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False) -> Cascade:
    """Read a folder; see `open_family`."""
    models = {name: (folder / name, settings) for name, settings in _stages(folder).items()}
    return replace(of_models(models, device, precision, compiled=compiled), folder=folder)


def of_models(
    models: Mapping[str, tuple[Path, Mapping[str, Any]]],
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    *,
    compiled: bool = False,
) -> Cascade:
    """A cascade of models that lie anywhere: folder and settings by the names of the stages; see `open_family`.

    Raises:
        CheckpointError: a model does not fit its place.
    """
    stages: list[Stage] = []
    for name, (folder, settings) in models.items():
        family = open_family(folder, device, precision, compiled=compiled)
        what = f"'{folder}' cannot be the stage '{name}' of a cascade"
        if not isinstance(family, Family) or (family.low_resolution is None) == bool(stages):
            role = "enlarge pictures" if stages else "generate pictures from nothing"
            raise CheckpointError(what, f"it does not {role}")
        if isinstance(family, UnCLIP):
            raise CheckpointError(what, "it is of unCLIP", "enlarge its pictures by ldm sample --upscale instead")
        stages.append(Stage(name, family, settings))
    return Cascade(tuple(stages), PixelCodec(), is_compiled=compiled)


def outline_folder(folder: Path) -> dict[str, nn.Module]:
    """See `outline_family`."""
    outlines = {name: outline_family(folder / name) for name in _stages(folder)}
    return {f"{stage}/{name}": model for stage, models in outlines.items() for name, model in models.items()}


def _stages(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of the stages by their subfolders.

    Raises:
        CheckpointError: the index names no subfolders with settings.
    """
    found = read_model_json(folder / INDEX_NAME).get(_STAGES)
    pairs = found.items() if isinstance(found, dict) else ()
    if len(pairs) > 1 and all(isinstance(own, dict) and Path(name).name == name for name, own in pairs):
        return dict(pairs)
    cause = f"{_STAGES}={found!r}, expected two subfolders or more, each with its settings"
    raise CheckpointError(f"cannot use '{folder / INDEX_NAME}'", cause)
