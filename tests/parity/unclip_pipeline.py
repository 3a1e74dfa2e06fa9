"""An unCLIP folder that diffusers wrote, small enough for tests, with shapes drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.sampling.noise import initial_noise, step_noise
from ldm_cli.sampling.request import ImageRequest
from tests.parity.their_pipeline import PROMPTS, latents
from tests.sampling.tiny import TEXT, UNET, VAE, randomize, special_ids, tiny_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
PRIOR_SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_small_log",
    "prediction_type": "sample",
}
REQUESTS = [ImageRequest(prompt, seed) for seed, prompt in enumerate(PROMPTS, start=3)]


def their_parts(folder: Path, seed: int) -> dict[str, Any]:
    """The components of both pipelines."""
    choose, tokenizer = random.Random(seed), tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    heads = choose.choice([1, 2])
    size, ids = heads * choose.choice([8, 16]), special_ids(tokenizer)
    tower = {"num_attention_heads": heads, "hidden_size": size, "projection_dim": size, "num_hidden_layers": 2}
    text = transformers.CLIPTextConfig(**(TEXT | tower | ids))
    vision = transformers.CLIPVisionConfig(**tower, intermediate_size=24, image_size=16, patch_size=8)
    prior = diffusers.PriorTransformer(
        num_attention_heads=choose.choice([1, 2]),
        attention_head_dim=choose.choice([8, 12]),
        num_layers=2,
        embedding_dim=size,
        num_embeddings=text.max_position_embeddings,
    )
    normalizer = diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(embedding_dim=size)
    unet = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * size}
    their_tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    randomize(prior, 5).clip_std.data.abs_().add_(0.5)
    randomize(normalizer, 6).std.data.abs_().add_(0.5)
    return {
        "tokenizer": their_tokenizer,
        "text_encoder": randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, **ids)), 2),
        "unet": randomize(diffusers.UNet2DConditionModel(**(UNET | unet)), 4),
        "scheduler": diffusers.DDIMScheduler(**DDIM, steps_offset=choose.choice([0, 1])),
        "vae": randomize(diffusers.AutoencoderKL(**VAE), 1),
        "image_normalizer": normalizer,
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "prior_tokenizer": their_tokenizer,
        "prior_text_encoder": randomize(transformers.CLIPTextModelWithProjection(text), 7),
        "prior": prior,
        "prior_scheduler": diffusers.DDPMScheduler(**PRIOR_SCHEDULER, clip_sample_range=choose.choice([0.8, 5.0])),
        "image_encoder": randomize(transformers.CLIPVisionModelWithProjection(vision), 8),
        "feature_extractor": transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    }


def their_unclip_folder(folder: Path, seed: int = 0) -> Path:
    """Write a StableUnCLIPPipeline into a subfolder; returns that."""
    parts = their_parts(folder, seed)
    del parts["image_encoder"], parts["feature_extractor"]
    diffusers.StableUnCLIPPipeline(**parts).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def their_variation_folder(folder: Path, seed: int = 0) -> Path:
    """Write a StableUnCLIPImg2ImgPipeline into a subfolder; returns that."""
    parts = {name: part for name, part in their_parts(folder, seed).items() if not name.startswith("prior")}
    diffusers.StableUnCLIPImg2ImgPipeline(**parts).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def yielding(noise: Callable[[int], Tensor]) -> Callable[..., Tensor]:
    """A `randn_tensor` whose answers are those of `noise`, step by step."""

    def steps() -> Iterator[Tensor]:
        number = 0
        while True:
            yield noise(number)
            number += 1

    found = steps()
    return lambda *_, **__: next(found)


def as_bytes(images: Any) -> Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


def theirs(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str = "StableUnCLIPPipeline", **given: Any) -> Tensor:
    """Their pictures, with our noise."""
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    size, cpu = pipeline.image_normalizer.config.embedding_dim, torch.device("cpu")
    modules = diffusers.pipelines.stable_diffusion
    for name in ("pipeline_stable_unclip", "pipeline_stable_unclip_img2img"):
        noise = initial_noise(REQUESTS, (size,), cpu, "image embedding")
        monkeypatch.setattr(getattr(modules, name), "randn_tensor", lambda *_, noise=noise, **__: noise)
    steps = step_noise(REQUESTS, (size,), cpu, "prior")
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", yielding(steps))
    arguments = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 16, "width": 16} | given
    if kind == "StableUnCLIPPipeline":
        first = initial_noise(REQUESTS, (size,), cpu, "prior")
        arguments |= {"prompt": PROMPTS, "prior_latents": first, "prior_num_inference_steps": 4}
    return as_bytes(pipeline(latents=latents(), output_type="np", **arguments).images)
