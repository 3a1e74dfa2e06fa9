"""Single files against diffusers, in both directions, and back into folders: the same tensors, the same pictures."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm_cli.formats.model_source import load_tensors, weights_sha256
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.stages.convert import ConvertOptions, run
from tests.parity import original_names
from tests.sampling.tiny import loaded_pipeline, randomize, special_ids, tiny_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS, NEGATIVE = ["a small red circle at the top left", "a blue square"], "green"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KINDS = {
    "sd1": {},
    "inpainting": {"in_channels": 9},
    "sd2": {"use_linear_projection": True},
    "xl": {"use_linear_projection": True, "addition_embed_type": "text_time"},
}


def text_config(choose: random.Random, tokenizer: Any, activation: str, heads: int) -> Any:
    """A tower with heads of 64, as all published ones."""
    return transformers.CLIPTextConfig(
        **special_ids(tokenizer),
        hidden_size=64 * heads,
        intermediate_size=choose.choice([32, 56]),
        num_hidden_layers=choose.choice([1, 2]),
        num_attention_heads=heads,
        projection_dim=choose.choice([24, 40]),
        hidden_act=activation,
    )


def their_pipeline(kind: str, seed: int, folder: Path) -> Any:
    """A pipeline with drawn shapes, and with heads, groups and activations of the published models."""
    choose, tokenizer = random.Random(seed), tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    tokenizer.save(folder / "tokenizer_2")
    levels, is_linear = choose.choice([2, 3]), "use_linear_projection" in KINDS[kind]
    channels = [(64 if is_linear else 32) * choose.choice([1, 2]) for _ in range(levels)]
    # diffusers tells the towers of XL by their widths.
    heads = choose.sample([1, 2], 2)
    first = text_config(choose, tokenizer, "gelu" if kind == "sd2" else "quick_gelu", heads[0])
    second = text_config(choose, tokenizer, "gelu", heads[1])
    attended = [choose.random() < 0.6 for _ in range(levels)]
    fields: dict[str, Any] = {
        "sample_size": 64,
        "block_out_channels": channels,
        "layers_per_block": choose.choice([1, 2]),
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attended)],
        "cross_attention_dim": first.hidden_size + (second.hidden_size if kind == "xl" else 0),
        "attention_head_dim": [width // 64 for width in channels] if is_linear else 8,
        **KINDS[kind],
    }
    if kind == "xl":
        fields["transformer_layers_per_block"] = [choose.choice([1, 2]) if one else 1 for one in attended]
        fields |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": second.projection_dim + 48}
    vae_channels = [32 * choose.choice([1, 2]) for _ in range(choose.choice([1, 2]))]
    vae = diffusers.AutoencoderKL(
        block_out_channels=vae_channels,
        layers_per_block=choose.choice([1, 2]),
        down_block_types=["DownEncoderBlock2D"] * len(vae_channels),
        up_block_types=["UpDecoderBlock2D"] * len(vae_channels),
        scaling_factor=0.13025 if kind == "xl" else 0.18215,
    )
    models = {
        "vae": randomize(vae, 1),
        "text_encoder": randomize(transformers.CLIPTextModel(first), 2),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "unet": randomize(diffusers.UNet2DConditionModel(**fields), 3),
    }
    if kind == "xl":
        models["text_encoder_2"] = randomize(transformers.CLIPTextModelWithProjection(second), 4)
        models["tokenizer_2"] = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        return diffusers.StableDiffusionXLPipeline(**models, scheduler=diffusers.EulerDiscreteScheduler(**BETAS))
    if kind == "sd2":
        solver = {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False}
        scheduler = diffusers.DDIMScheduler(**BETAS, **solver)
    else:
        scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True)
    classes = {"inpainting": diffusers.StableDiffusionInpaintPipeline}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return classes.get(kind, diffusers.StableDiffusionPipeline)(**models, scheduler=scheduler, **none)


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def our_images(path: Path, factor: int) -> torch.Tensor:
    config = SamplingConfig(steps=4, guidance=7.5, negative=NEGATIVE, width=8 * factor, height=8 * factor)
    requests = [ImageRequest(prompt, 0) for prompt in PROMPTS]
    return torch.stack([image.pixels for image in loaded_pipeline(path).generate(requests, config, noise())])


def their_images(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 7.5, "latents": noise(), "output_type": "np"}
    size = 8 * pipeline.vae_scale_factor
    result = pipeline(PROMPTS, negative_prompt=[NEGATIVE] * 2, height=size, width=size, **options)
    return (torch.from_numpy(result.images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_single_file_gives_the_pictures_that_diffusers_draws(kind: str, seed: int, tmp_path: Path) -> None:
    pipeline = their_pipeline(kind, seed, tmp_path)
    file = original_names.write(pipeline, tmp_path / "model.safetensors")
    expected = their_images(pipeline)
    found = our_images(file, pipeline.vae_scale_factor)
    assert expected.float().std() > 10
    assert (found.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_folder_to_file_to_folder_keeps_each_tensor_and_the_file_opens_in_diffusers(
    kind: str, seed: int, tmp_path: Path
) -> None:
    pipeline = their_pipeline(kind, seed, tmp_path)
    pipeline.save_pretrained(tmp_path / "their")
    file = tmp_path / "ours.safetensors"
    run(tmp_path / "their", file, ConvertOptions())
    theirs = load_file(original_names.write(pipeline, tmp_path / "theirs.safetensors"))
    ours = load_file(file)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    opened = type(pipeline).from_single_file(str(file), config=str(tmp_path / "their"), local_files_only=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2")[: 4 if kind == "xl" else 3]:
        before, after = getattr(pipeline, name).state_dict(), getattr(opened, name).state_dict()
        assert set(before) == set(after)
        assert all(torch.equal(before[n], after[n]) for n in before)
    run(file, tmp_path / "back", ConvertOptions())
    for name in ("unet", "vae", "text_encoder", "text_encoder_2")[: 4 if kind == "xl" else 3]:
        before, after = load_tensors(tmp_path / "their" / name), load_tensors(tmp_path / "back" / name)
        after = {n.removeprefix("text_model.") if n not in before else n: t for n, t in after.items()}
        assert set(before) == set(after)
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert weights_sha256(file / name) == weights_sha256(tmp_path / "back" / name)
