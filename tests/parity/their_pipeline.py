"""A Stable Diffusion folder that diffusers wrote, small enough for tests, and what both sides are asked for."""

import pytest
import torch

from tests.sampling.tiny import TEXT, UNET, VAE, randomize, special_ids, tiny_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a small red circle at the top left", "a blue square"]
NEGATIVE = "green"


def scheduler(name, **fields):
    """One with the settings of Stable Diffusion 1."""
    stable = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    extra = {"ddim": {"clip_sample": False, "set_alpha_to_one": False}, "pndm": {"skip_prk_steps": True}}
    classes = {
        "ddim": diffusers.DDIMScheduler,
        "pndm": diffusers.PNDMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    }
    return classes[name](**(stable | extra.get(name, {}) | fields))


def their_folder(folder, the_scheduler, **unet):
    """Write a pipeline into a subfolder; returns that."""
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "own_tokenizer")
    text = transformers.CLIPTextConfig(**TEXT, **special_ids(tokenizer))
    pipeline = diffusers.StableDiffusionPipeline(
        vae=randomize(diffusers.AutoencoderKL(**VAE), 1),
        text_encoder=randomize(transformers.CLIPTextModel(text), 2),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "own_tokenizer"),
        unet=randomize(diffusers.UNet2DConditionModel(**(UNET | unet)), 3),
        scheduler=the_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def latents(channels=4):
    """Initial noise for both prompts."""
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(7))
