"""T5 as the only text encoder of a U-Net: training, the folder, the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.errors import CheckpointError, RecipeError, UsageError
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.families.t5_encoder import T5Encoder
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.stages import convert
from ldm_cli.stages.convert import ConvertOptions
from ldm_cli.stages.train_unet import parameters

from .test_precompute import assert_a_cache_changes_nothing
from .tiny import trained, unet_recipe
from .tiny_sd3 import WIDTH, save_tiny_sd3

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An autoencoder, two CLIP towers and T5, untrained."""
    return save_tiny_sd3(tmp_path_factory.mktemp("parts"))


def t5_recipe(scenes: Path, parts: dict[str, str], **train: Any) -> dict[str, Any]:
    recipe = unet_recipe(scenes, Path(), Path(), **train) | {
        "vae": parts["vae"],
        "text_encoder": parts["text_encoder_3"],
    }
    recipe["unet"] = recipe["unet"] | {"cross_attention_dim": WIDTH, "in_channels": 4, "out_channels": 4}
    return recipe | {"max_sequence_length": 9}


def test_the_folder_of_a_run_gives_the_pictures_of_diffusers(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    trained(t5_recipe(scenes, parts, steps=3), tmp_path)
    family = open_family(tmp_path)
    assert isinstance(family.encoder, T5Encoder)
    assert family.encoder.length == 9
    assert set(outline_family(tmp_path / "model")) == {"unet", "vae", "text_encoder"}
    noise = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(7))
    config = SamplingConfig(sampler="ddim", steps=4, guidance=4.0, width=24, height=24)
    images = Pipeline(family).generate([ImageRequest(prompt, 0) for prompt in PROMPTS], config, noise)
    ours = torch.stack([image.pixels for image in images])
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    theirs.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 24, "width": 24, "output_type": "np"}
    expected = torch.from_numpy(theirs(PROMPTS, latents=noise, **given).images).permute(0, 3, 1, 2) * 255
    assert expected.std() > 10
    assert (ours.int() - expected.round().int()).abs().max() <= 2
    with pytest.raises(CheckpointError, match="has no place for 'text_encoder'"):
        convert.run(tmp_path, tmp_path / "x.safetensors", ConvertOptions(), SilentReporter())
    with pytest.raises(UsageError, match="clip_skip=2 is not possible: the text encoder is T5"):
        family.encoder.check(PromptReading(clip_skip=2))


def test_training_from_a_cache_gives_the_same_weights_and_losses(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    assert_a_cache_changes_nothing(t5_recipe(scenes, parts, steps=4, log_every=1, save_every=4), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_skip": 2}, "clip_skip and caption_chunks are for CLIP"),
        (
            {"text_encoder_2": "text_encoder_2"},
            "text_encoder is T5: beside a CLIP name it text_encoder_3, and the CLIP text_encoder",
        ),
        ({"text_encoder": "text_encoder"}, "max_sequence_length is for T5, and text_encoder is a CLIP"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    scenes: Path, parts: dict[str, str], change: dict[str, Any], message: str
) -> None:
    change = {field: parts.get(str(value), value) for field, value in change.items()}
    with pytest.raises(RecipeError, match=message):
        parameters(TrainUnetRecipe.from_mapping(t5_recipe(scenes, parts) | change), [])
