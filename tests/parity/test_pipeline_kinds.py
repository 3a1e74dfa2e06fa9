"""Folders of the other pipelines of Stable Diffusion, against diffusers: distilled, img2img, inpainting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_cli.errors import CheckpointError, RecipeError
from ldm_cli.families.open_family import open_family
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.stages.dry_run import dry_run
from tests.parity import test_editing as editing
from tests.parity.their_pipeline import PROMPTS, latents, scheduler, their_folder
from tests.sampling.tiny import loaded_pipeline

diffusers = pytest.importorskip("diffusers")


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def their_pictures(folder: Path, kind: str, **given: Any) -> Tensor:
    loaded = getattr(diffusers, kind).from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    loaded.set_progress_bar_config(disable=True)
    result = loaded(PROMPTS, latents=latents(), output_type="np", **given)
    return (torch.from_numpy(result.images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


def our_pictures(folder: Path, **fields: Any) -> Tensor:
    requests = [ImageRequest(prompt, 0) for prompt in PROMPTS]
    generated = loaded_pipeline(folder).generate(requests, SamplingConfig.from_mapping(fields), latents())
    return torch.stack([image.pixels for image in generated])


@pytest.mark.parametrize("guidance", [1.0, 3.5, 9.0])
@pytest.mark.parametrize("width", [8, 33, 256])
def test_a_unet_that_was_distilled_with_guidance_is_given_its_scale(
    tmp_path: Path, width: int, guidance: float
) -> None:
    folder = their_folder(tmp_path, scheduler("ddim"), time_cond_proj_dim=width)
    found = our_pictures(folder, steps=4, guidance=guidance, negative="green")
    expected = their_pictures(
        folder, "StableDiffusionPipeline", num_inference_steps=4, guidance_scale=guidance, negative_prompt=["green"] * 2
    )
    assert expected.float().std() > 10, "flat pictures prove nothing"
    assert (found.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("guidance", [1.0, 8.5])
def test_a_latent_consistency_model_is_drawn_as_its_own_pipeline_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    folder = their_folder(tmp_path, diffusers.LCMScheduler(), time_cond_proj_dim=32)
    change_json(folder / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    draws: list[int] = []

    def noise(*_: Any, **__: Any) -> Tensor:
        draws.append(len(draws))
        return torch.full((2, 4, 8, 8), 0.1 * len(draws))

    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", noise)
    expected = their_pictures(folder, "LatentConsistencyModelPipeline", num_inference_steps=4, guidance_scale=guidance)
    monkeypatch.setattr(
        "ldm_cli.sampling.latent_sampler.step_noise",
        lambda requests, shape, device: lambda i: torch.full((len(requests), *shape), 0.1 * (i + 1)),
    )
    found = our_pictures(folder, steps=4, guidance=guidance)
    assert len(draws) == 3
    assert expected.float().std() > 10, "flat pictures prove nothing"
    assert (found.int() - expected.int()).abs().max() <= 2


def test_a_latent_consistency_pipeline_that_clips_is_refused(tmp_path: Path) -> None:
    folder = their_folder(tmp_path, diffusers.LCMScheduler(), time_cond_proj_dim=32)
    change_json(folder / "scheduler" / "scheduler_config.json", clip_sample=True)
    loaded_pipeline(folder)
    change_json(folder / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    with pytest.raises(CheckpointError, match="clip_sample=True is not supported"):
        loaded_pipeline(folder)


@pytest.mark.parametrize("kind", ["StableDiffusionInpaintPipeline", "StableDiffusionInpaintPipelineLegacy"])
@pytest.mark.parametrize("in_channels", [4, 9])
def test_a_folder_of_an_inpainting_pipeline_is_drawn_as_that_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_channels: int, kind: str
) -> None:
    folder = their_folder(tmp_path, scheduler("pndm", skip_prk_steps=False), in_channels=in_channels)
    change_json(folder / "model_index.json", _class_name=kind)
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint
    editing.assert_filled_alike(diffusers.StableDiffusionInpaintPipeline, folder, monkeypatch, module, "ddim", 1.0)


@pytest.mark.parametrize("strength", [0.4, 0.9])
def test_a_folder_of_an_img2img_pipeline_is_drawn_as_that_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    folder = their_folder(tmp_path, scheduler("ddim"))
    change_json(folder / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
    kind = diffusers.StableDiffusionImg2ImgPipeline
    expected = editing.theirs(kind, folder, monkeypatch, module, "euler", strength)
    assert (editing.ours(folder, "euler", strength, None).int() - expected.int()).abs().max() <= 2


NEEDING_MORE = [
    {"num_class_embeds": 10},
    {"class_embed_type": "timestep"},
    {"class_embed_type": "identity"},
    {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
    {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 58},
]


@pytest.mark.parametrize("fields", NEEDING_MORE)
def test_a_unet_that_needs_another_condition_is_refused_and_so_is_its_dry_run(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    folder = their_folder(tmp_path, scheduler("ddim"), **fields)
    name, value = next(iter(fields.items()))
    with pytest.raises(CheckpointError, match=f"unet.{name}={value} asks for a condition that is not supported"):
        loaded_pipeline(folder)
    asked = SampleRecipe.from_mapping({"command": "sample", "model": str(folder), "prompts": ["a"]})
    with pytest.raises(CheckpointError, match=f"unet.{name}={value} asks for a condition that is not supported"):
        dry_run(asked, SilentReporter())


@pytest.mark.parametrize("fields", [*NEEDING_MORE, {"time_cond_proj_dim": 32}])
@pytest.mark.parametrize("are_parts_there", [False, True])
def test_training_such_a_unet_is_refused_in_the_dry_run(
    tmp_path: Path, fields: dict[str, Any], are_parts_there: bool
) -> None:
    folder = their_folder(tmp_path, scheduler("ddim")) if are_parts_there else tmp_path / "nothing"
    unet = {"block_out_channels": [16, 32], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 24, "attention_head_dim": 2,
            "norm_num_groups": 8}  # fmt: skip
    recipe = {
        "command": "train-unet", "name": "x", "data": {"shards": "none-{0..1}.tar", "image_size": 16},
        "vae": str(folder / "vae"), "text_encoder": str(folder / "text_encoder"), "unet": unet | fields,
        "train": {"steps": 1, "batch_size": 2},
    }  # fmt: skip
    name, value = next(iter(fields.items()))
    with pytest.raises(RecipeError, match=f"unet.{name}={value} asks for a condition that train-unet does not have"):
        dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vae/config.json", {"scaling_factor": float("inf")}, "scaling_factor"),
        ("unet/config.json", {"conv_in_kernel": 5}, "conv_in_kernel"),
        ("unet/config.json", {"cross_attention_dim": 32}, r"attn2.to_k.weight is \[\d+, 24\], not \[\d+, 32\]"),
        ("unet/config.json", {"in_channels": 5}, r"conv_in.weight is \[16, 4, 3, 3\], not \[16, 5, 3, 3\]"),
        ("text_encoder/config.json", {"vocab_size": 30}, r"token_embedding.weight is \[551, 24\], not \[30, 24\]"),
        ("text_encoder/config.json", {"num_hidden_layers": 7}, "missing: text_model.encoder.layers.2"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding=True"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ("model_index.json", {"_class_name": "KandinskyPipeline"}, "KandinskyPipeline"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    tmp_path: Path, part: str, values: dict[str, Any], message: str
) -> None:
    folder = their_folder(tmp_path, scheduler("ddim"))
    asked = SampleRecipe.from_mapping({"command": "sample", "model": str(folder), "prompts": ["a"]})
    assert dry_run(asked, SilentReporter())["parameters"].keys() == {"unet", "vae", "text_encoder"}
    change_json(folder / part, **values)
    with pytest.raises(CheckpointError, match=message) as refused:
        dry_run(asked, SilentReporter())
    with pytest.raises(CheckpointError) as error:
        open_family(folder)
    assert str(refused.value) == str(error.value)


def test_a_dry_run_refuses_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    folder = their_folder(tmp_path, scheduler("ddim"))
    weights = folder / "text_encoder/model.safetensors"
    tensors = load_file(weights)
    (name,) = (name for name in tensors if name.endswith("token_embedding.weight"))
    save_file(tensors | {name: tensors[name][:30].clone()}, weights, {"format": "pt"})
    change_json(folder / "text_encoder/config.json", vocab_size=30)
    asked = SampleRecipe.from_mapping({"command": "sample", "model": str(folder), "prompts": ["a"]})
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens, the text_encoder 30"):
        dry_run(asked, SilentReporter())
