"""Adapters that become part of the weights of a model that is converted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm_cli.core.low_rank import WeightUpdate
from ldm_cli.core.precision import DTYPES
from ldm_cli.errors import CheckpointError
from ldm_cli.families.adapted import updated
from ldm_cli.families.lora_reader import read_lora
from ldm_cli.formats.lora_names import Adaptable
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_3, TRANSFORMER, UNET, VAE
from ldm_cli.stages.support.convertible import FoundModels


def merged(models: FoundModels, loras: Sequence[tuple[Path, float]], dtype: str | None) -> FoundModels:
    """The models with W + Σ s·Δ in place of W, computed in float32 and rounded once.

    Args:
        models: a pipeline, or a U-Net or text encoder by itself.
        loras: files of adapters, and s of each.
        dtype: of the weights that change, `fp32`, `fp16` or `bf16`; None: as they are.

    Raises:
        InputNotFoundError, CheckpointError: as in `read_lora`, or weights would not be finite.
    """
    if not loras:
        return models
    alone = {"UNet2DConditionModel": UNET, "SD3Transformer2DModel": TRANSFORMER}
    names = {name or alone.get(m.kind, TEXT_ENCODER): name for name, m in models.models.items()}
    adaptable = {
        component: Adaptable(models.models[name].tensors, models.models[name].complete)
        for component, name in sorted(names.items(), key=lambda pair: (pair[0].startswith(TEXT_ENCODER), pair[0]))
        if component not in (VAE, TEXT_ENCODER_3)
    }
    parts: dict[str, dict[str, list[tuple[WeightUpdate, float]]]] = {}
    for path, scale in loras:
        for component, updates in read_lora(path, adaptable).items():
            for module, update in updates.items() if scale else ():
                parts.setdefault(component, {}).setdefault(f"{module}.weight", []).append((update, scale))
    changed = dict(models.models)
    for component, own in parts.items():
        model = changed[names[component]]
        tensors = dict(model.tensors)
        for name, several in own.items():
            kind = tensors[name].dtype if dtype is None else DTYPES[dtype]
            tensors[name] = updated(tensors[name], several).to(kind)
            if not tensors[name].isfinite().all():
                cause = f"{component}.{name} would not be finite"
                raise CheckpointError("cannot merge the adapters", cause, "lower their weights")
        changed[names[component]] = replace(model, tensors=tensors)
    origin = ", ".join(f"{path.name}={scale:g}" for path, scale in loras)
    return replace(models, models=changed, metadata=models.metadata | {"modelspec.merged_from": origin})
