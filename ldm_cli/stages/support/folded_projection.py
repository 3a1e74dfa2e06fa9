"""A Stable Diffusion 3 whose first text tower has no projection, as single files of it know none."""

from __future__ import annotations

from dataclasses import replace

import torch

from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TRANSFORMER
from ldm_cli.stages.support.convertible import FoundModel, FoundModels

_FIRST_LAYER = "time_text_embed.text_embedder.linear_1.weight"
_PROJECTION = "text_projection.weight"


def without_projection(models: FoundModels) -> FoundModels:
    """The same model, whose first tower projects by the identity.

    The projection P becomes part of the layer that reads the pooled texts x, y of both towers:
    W (P x, y) = (W_x P, W_y) (x, y). Models of other kinds, and published ones, stay as they are.
    """
    tower, transformer = models.models.get(TEXT_ENCODER), models.models.get(TRANSFORMER)
    if tower is None or transformer is None:
        return models
    projection = tower.tensors[_PROJECTION]
    outputs, width = projection.shape
    identity = torch.eye(width).to(projection.dtype)
    if outputs == width and torch.equal(projection, identity):
        return models
    weight = transformer.tensors[_FIRST_LAYER]
    folded = torch.cat([weight[:, :outputs].float() @ projection.float(), weight[:, outputs:].float()], dim=1)
    changed = {
        TEXT_ENCODER: _changed(tower, _PROJECTION, identity, projection_dim=width),
        TRANSFORMER: _changed(
            transformer, _FIRST_LAYER, folded.to(weight.dtype), pooled_projection_dim=folded.shape[1]
        ),
    }
    return replace(models, models=models.models | changed)


def _changed(model: FoundModel, name: str, tensor: torch.Tensor, **fields: int) -> FoundModel:
    return replace(
        model, tensors=model.tensors | {name: tensor}, content=model.content | fields, complete=model.complete | fields
    )
