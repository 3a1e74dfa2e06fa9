"""Recipes of models with a few thousand parameters, and runs of them through the stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_config import CLIPConfig
from ldm_cli.data.batch import Batch
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS
from ldm_cli.recipe.ar_recipe import TrainArRecipe
from ldm_cli.recipe.prior_recipe import TrainPriorRecipe
from ldm_cli.recipe.schema import TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.reporting import Reporter, SilentReporter
from ldm_cli.stages import precompute, train_ar, train_clip, train_prior, train_unet, train_vae
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.stages.support.training_run import Workbench
from ldm_cli.training.run_folder import RunFolder

from ..faults.runs import assert_same_run

_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT = {**_TOWER, "image_size": 32, "patch_size": 8}
RESNET = {"model_type": "modified_resnet", "layers": [1, 1, 1, 1], "width": 4, "heads": 4, "image_size": 32}

_STAGES: dict[str, tuple[Any, Any]] = {
    "train-clip": (TrainClipRecipe, train_clip.run),
    "train-vae": (TrainVaeRecipe, train_vae.run),
    "train-unet": (TrainUnetRecipe, train_unet.run),
    "train-ar": (TrainArRecipe, train_ar.run),
    "train-prior": (TrainPriorRecipe, train_prior.run),
}


def _base(command: str, scenes: Path, data: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    given = {"shards": str(scenes / "train-*.tar"), "val_shards": str(scenes / "val-*.tar"), "image_size": 32}
    steps = {"steps": 12, "batch_size": 8, "log_every": 4, "save_every": 5, "validation_samples": 6}
    return {"command": command, "name": "tiny", "data": {**given, **data}, "train": {**steps, **train}}


def clip_recipe(scenes: Path, vision: Mapping[str, Any] = VIT, **train: Any) -> dict[str, Any]:
    text = {**_TOWER, "max_position_embeddings": 24}
    return _base("train-clip", scenes, {}, train) | {
        "clip": {"projection_dim": 16, "text_config": text, "vision_config": dict(vision)},
        "tokenizer": {"vocab_size": 560},
    }


def vae_recipe(
    scenes: Path,
    loss: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    **train: Any,
) -> dict[str, Any]:
    model = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "latent_channels": 3,
        "mid_block_add_attention": False,
    }
    return _base("train-vae", scenes, data or {}, train) | {"vae": model | dict(vae or {}), "loss": dict(loss or {})}


def vq_recipe(scenes: Path, codebook: Mapping[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    """As `vae_recipe`, with a codebook of 16 codes of 4 channels; it changes fast."""
    recipe = vae_recipe(scenes, **given)
    sizes = {"num_vq_embeddings": 16, "vq_embed_dim": 4}
    return recipe | {"vae": None, "vq": recipe["vae"] | sizes, "codebook": {"decay": 0.8, **(codebook or {})}}


def unet_recipe(
    scenes: Path,
    clip: Path,
    vae: Path,
    diffusion: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    **train: Any,
) -> dict[str, Any]:
    model = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    }
    samples = {"num_prompts": 2, "sampling": {"steps": 2, "images_per_prompt": 1}}
    return _base("train-unet", scenes, data or {}, train) | {
        "vae": str(vae),
        "text_encoder": str(clip),
        "unet": model,
        "diffusion": dict(diffusion or {}),
        "samples": samples,
    }


def ar_recipe(scenes: Path, vq: Path, data: Mapping[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    return _base("train-ar", scenes, data or {}, train) | {
        "vq": str(vq),
        "tokenizer": {"vocab_size": 560},
        "text_length": 16,
        "transformer": _TOWER | {"initializer_range": 0.1},
        "samples": {"num_prompts": 2},
    }


def prior_recipe(scenes: Path, clip: Path, data: Mapping[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    return _base("train-prior", scenes, data or {}, train) | {
        "clip": str(clip),
        "prior": sizes | {"embedding_dim": 16, "num_embeddings": 24},
        "validation": {"steps": 3, "scale": 1.0},
    }


def decoder_recipe(scenes: Path, clip: Path, vae: Path, **given: Any) -> dict[str, Any]:
    """As `unet_recipe`, of a decoder of the CLIP's image embeddings."""
    recipe = unet_recipe(scenes, clip, vae, **given)
    embedding = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 32}
    return recipe | {"unet": recipe["unet"] | embedding, "image_embedding": {"image_encoder": str(clip)}}


def trained(
    recipe: Mapping[str, Any], out: Path, reporter: Reporter | None = None, device: str = "cpu", **options: Any
) -> dict[str, Any]:
    """The result of the stage that the recipe is for."""
    schema, run = _STAGES[recipe["command"]]
    chosen = RunOptions(out=out, device=device, recipe_text=json.dumps(recipe), **options)
    result: dict[str, Any] = run(schema.from_mapping(recipe), chosen, reporter or SilentReporter())
    return result


def workbench(recipe: Any, path: Path, held_out: tuple[Batch, ...] = ()) -> Workbench:
    """What the task of a parsed recipe works with."""
    shards = open_shards(recipe.data.shards, recipe.data, SilentReporter())
    return Workbench(RunFolder(path, SilentReporter()), shards, held_out, torch.device("cpu"), SilentReporter())


def cached(
    recipe: Mapping[str, Any], folder: Path, dtype: Any = None, reporter: Reporter | None = None, **options: Any
) -> dict[str, Any]:
    """The recipe with a cache, which is made."""
    wanted = {**recipe, "cache": str(folder)}
    schema, _ = _STAGES[recipe["command"]]
    chosen = RunOptions(device="cpu", **options)
    precompute.run(schema.from_mapping(wanted), chosen, reporter or SilentReporter(), dtype)
    return wanted


def losses(run: Path) -> list[float]:
    """The logged losses."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def save_random_clip(folder: Path, tokenizer: Tokenizer, max_position_embeddings: int = 32) -> CLIPModel:
    """Write a CLIP of images of 16 px with random weights, and its tokenizer."""
    text = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.start_id}
    text |= {"max_position_embeddings": max_position_embeddings}
    text |= {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
    vision = _TOWER | {"image_size": 16, "patch_size": 8}
    sections = {"text_config": _TOWER | text, "vision_config": vision, "projection_dim": 8}
    clip = CLIPModel(CLIPConfig.from_mapping(sections))
    save_model(folder, clip.state_dict(), clip.config.to_hugging_face(), TRANSFORMERS_WEIGHTS)
    tokenizer.save(folder)
    return clip


class Lost(BaseException):
    """Stands for a kill: nothing is saved or tidied after it."""


def lose_after(step: int, recipe: Mapping[str, Any], out: Path, **options: Any) -> None:
    """A process that is lost right after the checkpoint of `step` was committed."""
    write_status = RunFolder.status

    def status(self: RunFolder, state: str, **details: Any) -> None:
        write_status(self, state, **details)
        if state == "running" and details["step"] == step:
            raise Lost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "status", status)
        with pytest.raises(Lost):
            trained(recipe, out, **options)


def assert_resumes(recipe: Mapping[str, Any], folder: Path, *lost_after: int) -> None:
    """A run that is lost after the checkpoints of some steps ends in the same bits as `whole` in the folder."""
    trained(recipe, folder / "whole")
    for step in lost_after:
        lose_after(step, recipe, folder / "broken")
    trained(recipe, folder / "broken")
    assert_same_run(folder / "whole", folder / "broken", recipe["train"]["steps"])
