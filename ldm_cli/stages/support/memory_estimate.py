"""What training takes of a device's memory in all, and what it would take with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm_cli.core.precision import precision_on
from ldm_cli.errors import InputNotFoundError
from ldm_cli.families.codec_folder import outline_codec
from ldm_cli.recipe.ar_recipe import TrainArRecipe
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.stages.support.activation_sizes import activation_bytes
from ldm_cli.stages.support.options import resolve_device

_USUAL_FACTOR = 8


def memory_estimate(
    recipe: TrainRecipe, resident: Mapping[str, int], num_trained: int, num_ranks: int
) -> dict[str, Any]:
    """The memory of each rank's device in bytes, estimated.

    Args:
        recipe: after `start_from` has been read.
        resident: `training_bytes`.
        num_ranks: that share the batch.

    Returns:
        `total`, what stays (`weights`, …), `activations`, and `with`: settings that save memory → total.
    """
    train = recipe.train
    rows, sizes = train.part_size(num_ranks), activation_bytes(recipe, _factor(recipe))
    stays = {name: size for name, size in resident.items() if name != "save" and size}
    is_half = precision_on(resolve_device("auto"), train.precision) != "fp32"

    def activations(rows: int, *, is_half: bool, is_checkpointed: bool) -> int:
        one = sizes["checkpointed" if is_checkpointed else "kept"]
        # Autocast keeps a copy of the weights in half precision beside the activations.
        return rows * one // 2 + 2 * num_trained if is_half else rows * one

    found = activations(rows, is_half=is_half, is_checkpointed=train.gradient_checkpointing)
    others: dict[str, int] = {}
    if rows > 1:
        changed = activations(rows // 2, is_half=is_half, is_checkpointed=train.gradient_checkpointing)
        others[f"train.micro_batch={rows // 2}"] = changed
    if not train.gradient_checkpointing:
        others["train.gradient_checkpointing=true"] = activations(rows, is_half=is_half, is_checkpointed=True)
    if not is_half:
        changed = activations(rows, is_half=True, is_checkpointed=train.gradient_checkpointing)
        others["train.precision=bf16"] = changed
    held = sum(stays.values())
    return {
        "total": held + found,
        **stays,
        "activations": found,
        "with": {setting: held + size for setting, size in others.items() if size < found},
    }


def _factor(recipe: TrainRecipe) -> int:
    """Pixels per latent of the autoencoder that the recipe names; the usual ones if it does not exist yet."""
    if isinstance(recipe, TrainUnetRecipe) and recipe.is_of_pixels:
        return 1
    folder = (
        recipe.vae if isinstance(recipe, TrainUnetRecipe) else recipe.vq if isinstance(recipe, TrainArRecipe) else ""
    )
    with suppress(InputNotFoundError):
        return outline_codec(Path(folder)).factor if folder else _USUAL_FACTOR
    return _USUAL_FACTOR
