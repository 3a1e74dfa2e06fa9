"""The folder of the published Stable Diffusion XL, with its sizes and without its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE
from ldm_cli.formats.scheduler_file import our_settings, write_scheduler
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainUnetRecipe, TrainVaeRecipe


def published_models() -> dict[str, nn.Module]:
    """The four networks on the meta device, by component."""
    recipe, vae = load_recipe("unet/sdxl").recipe, load_recipe("vae/sd-vae").recipe
    assert isinstance(recipe, TrainUnetRecipe)
    assert isinstance(vae, TrainVaeRecipe)
    sizes = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072}
    first = CLIPTextConfig(**sizes, projection_dim=768)
    sizes = {"num_hidden_layers": 32, "num_attention_heads": 20, "hidden_size": 1280, "intermediate_size": 5120}
    second = CLIPTextConfig(**sizes, projection_dim=1280, hidden_act="gelu")
    with torch.device("meta"):
        return {
            UNET: UNet2DConditionModel(recipe.model),
            VAE: AutoencoderKL(vae.model),
            TEXT_ENCODER: CLIPTextModel(first),
            TEXT_ENCODER_2: CLIPTextModelWithProjection(second),
        }


def write_published_xl(folder: Path) -> None:
    """Write configurations, and weights in half precision that are zero and take no room on the disk."""
    for name, model in published_models().items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(model.config.to_hugging_face()))
        file = "model" if name.startswith(TEXT_ENCODER) else "diffusion_pytorch_model"
        header, end = {}, 0
        for key, tensor in model.state_dict().items():
            begin, end = end, end + 2 * tensor.numel()
            header[key] = {"dtype": "F16", "shape": [*tensor.shape], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        path = folder / name / f"{file}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + end)
    settings = our_settings({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    write_scheduler(folder, settings, settings.scheduler_class)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
