"""The models of a recipe without their weights: their parameters, their bytes, and whether the machine has as many."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ldm_cli.errors import InputNotFoundError, RecipeError, amount, first_line
from ldm_cli.formats.model_folder import fitting_tensors, without_weights
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.recipe.train_recipe import StartedRecipe, TrainRecipe
from ldm_cli.stages.support.start import freeze, start_folder
from ldm_cli.training.config import TrainConfig

T = TypeVar("T")
FROZEN = ".frozen"
Parameters = tuple[dict[str, int], dict[str, int]]
"""Numbers of trained parameters by module, and of those that are only used. Each trainer's stage has a function
`parameters(recipe, notes)` that returns them, and tells `notes` which models do not exist yet."""
_LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)


def count_parameters(module: nn.Module) -> int:
    """Number of weights of a module, buffers left out."""
    return sum(parameter.numel() for parameter in module.parameters())


def outlined(build: Callable[[], nn.Module], recipe: StartedRecipe | None = None) -> nn.Module:
    """A model to be trained, on the meta device, with the parameters frozen that the recipe says.

    Args:
        build: makes the model.
        recipe: says where it starts and what stays frozen; None: all is trained, from fresh weights.

    Raises:
        RecipeError: the model is so large that not even its sizes can be written down; or `freeze` does not fit it.
        CheckpointError: the tensors of `start_from` do not fit it.
    """
    try:
        with without_weights():
            module = build()
    except RuntimeError as error:  # a tensor of more bytes than an int64 counts
        raise RecipeError("a model cannot exist", first_line(error), "give it smaller sizes") from error
    if recipe is not None and recipe.start_from is not None:
        fitting_tensors(module, start_folder(recipe))
        freeze(module, recipe.freeze)
    return module


def trained_parameters(name: str, module: nn.Module) -> Parameters:
    """The parameters of a trained model; frozen ones count as `NAME.frozen`."""
    total = count_parameters(module)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return {name: trained}, {f"{name}{FROZEN}": total - trained} if trained < total else {}


def model_at(field: str, folder: str, outline: Callable[[Path], T], notes: list[str]) -> T | None:
    """What `outline` gives of a model folder, usually the model on the meta device; a missing one is noted."""
    try:
        return outline(Path(folder))
    except InputNotFoundError as error:
        notes.append(f"{field}: {error.what}")
        return None


def halved_models(recipe: TrainRecipe) -> tuple[str, ...]:
    """The models whose weights are in half precision in memory: those that a LoRA recipe adapts, if it says so, and T5
    where training computes in half precision."""
    if not isinstance(recipe, TrainUnetRecipe):
        return ()
    t5 = (TEXT_ENCODER_3,) if recipe.train.precision in ("bf16", "fp16") else ()
    if (lora := recipe.lora) is None or lora.base_precision != "bf16":
        return t5
    return (recipe.component, *((TEXT_ENCODER, TEXT_ENCODER_2) if lora.text_encoder else ()), *t5)


_AUXILIARY = ("discriminator", "projection")


def training_bytes(
    trained: dict[str, int],
    frozen: dict[str, int],
    train: TrainConfig,
    num_ranks: int = 1,
    halved: Collection[str] = (),
) -> dict[str, int]:
    """What stays in the memory of each of `num_ranks` ranks while so many parameters are trained or used; weights and
    optimizer state are in fp32, but the weights of `halved` models.

    AdamW keeps two numbers per trained weight. The discriminator and the projection of features are not averaged. With
    `strategy: sharded` the ranks share the trained models, frozen parameters included, but not these two; each holds
    all other models.
    `save` is what rank 0 copies into main memory while it writes a checkpoint: whole weights and averages, frozen ones
    included, and its own moments.
    """
    num_parts = num_ranks if train.strategy == "sharded" else 1
    held = {name: count if name in _AUXILIARY else -(-count // num_parts) for name, count in trained.items()}
    used = {name: -(-count // num_parts) if name.endswith(FROZEN) else count for name, count in frozen.items()}
    num_trained = sum(held.values())
    num_averaged = sum(count for name, count in held.items() if name not in _AUXILIARY)
    num_auxiliary = sum(trained.get(name, 0) for name in _AUXILIARY)
    num_saved = sum(trained.values()) + sum(count for name, count in frozen.items() if name.endswith(FROZEN))
    num_copies = 1 if train.ema_decay is None else 2
    return {
        "weights": 4 * (num_trained + sum(used.values())) - 2 * sum(frozen.get(name, 0) for name in halved),
        "gradients": 4 * num_trained,
        "optimizer": 8 * num_trained,
        "ema": 4 * num_averaged if train.ema_decay is not None else 0,
        "save": 4 * (num_copies * num_saved - (num_copies - 1) * num_auxiliary) + 8 * num_trained,
    }


def expect_memory(
    recipe: TrainRecipe, parameters: Parameters, device: torch.device, world_size: int, *, reads_images: bool
) -> None:
    """Refuse what cannot be trained here, before anything is allocated; activations are not counted.

    Muon counts as if it trained all weights, with one number for each instead of two; so it is never overestimated.

    Raises:
        RecipeError: model or batch are larger than the memory there is.
    """
    trained, frozen = parameters
    sizes = training_bytes(trained, frozen, recipe.train, world_size, halved_models(recipe))
    if recipe.train.optimizer == "muon":
        sizes["save"] -= sizes["optimizer"] // 2
        sizes["optimizer"] //= 2
    on_host = sizes if device.type == "cpu" else {"save": sizes.pop("save")}
    for where, needed in ((device, sizes), (torch.device("cpu"), on_host)):
        if sum(needed.values()) > (room := memory_bytes(where)):
            listed = ", ".join(f"{name} {amount(size)}" for name, size in needed.items() if size)
            raise RecipeError(
                f"{' and '.join(trained)} with {sum(trained.values()):,} parameters cannot be trained on {device}",
                f"{listed}; there are {amount(room)} on {where}",
                "give the model smaller sizes; --dry-run shows what a recipe takes",
            )
    share, side = recipe.train.batch_size // world_size, recipe.data.image_size
    # All images of a step wait in main memory, a byte per colour.
    if reads_images and (size := share * 3 * side * side) > (room := memory_bytes(torch.device("cpu"))):
        raise RecipeError(
            f"train.batch_size={recipe.train.batch_size} images of data.image_size={side} do not fit into memory",
            f"{amount(size)}; there are {amount(room)}",
            "lower one of them",
        )


def memory_bytes(device: torch.device) -> int:
    """All memory that this process may get: the device's, or the machine's within the limits set for the process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _swap_bytes()]
    found += [limit for limit, _ in map(resource.getrlimit, _LIMITS) if limit != resource.RLIM_INFINITY]
    with suppress(OSError, ValueError):  # no Linux, or no limit: the word "max"
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("::/")[2].strip()
        found.append(int((Path("/sys/fs/cgroup") / group / "memory.max").read_text(encoding="utf-8")))
    return min(found)


def _swap_bytes() -> int:
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("SwapTotal:"))
    return 0
