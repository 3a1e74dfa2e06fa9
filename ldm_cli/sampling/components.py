"""Models out of their folders: U-Net, autoencoder, text encoder; and which folder a path means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.formats.model_folder import CONFIG_NAME, load_model
from ldm_cli.formats.pipeline_folder import INDEX_NAME

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_model(path: Path) -> Path:
    """The model folder that a path means: itself, or the model of a run or of a checkpoint.

    A run's is `model/` once it is finished, before that its newest checkpoint; a checkpoint's is `ema/` where
    weights are averaged, else `model/`.

    Raises:
        InputNotFoundError: there is no such folder, or no model in it.
    """
    if not path.is_dir():
        raise InputNotFoundError(f"model folder '{path}' not found", remedy="check --model, or train it first")
    manifests = sorted((path / "checkpoints").glob("step-*/manifest.json"))
    newest = [manifests[-1].parent / name for name in ("ema", "model")] if manifests else []
    for folder in (path, path / "ema", path / "model", *newest):
        if (folder / INDEX_NAME).is_file() or (folder / CONFIG_NAME).is_file():
            return folder
    raise InputNotFoundError(
        f"no model in '{path}'", f"neither {INDEX_NAME} nor {CONFIG_NAME}", "give a model folder or a run"
    )


def load_unet(folder: Path) -> UNet2DConditionModel:
    """A UNet2DConditionModel folder, in float32 on the CPU; errors as in `load_model`."""
    return load_model(UNet2DConditionModel, folder)


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """An AutoencoderKL folder, as `load_unet`."""
    return load_model(AutoencoderKL, folder)


def load_text_encoder(folder: Path) -> CLIPTextModel:
    """A CLIPTextModel folder, or the text tower of a CLIPModel folder, as `load_unet`."""
    return load_model(CLIPTextModel, folder, _text_config, allow_extra=True)


def takes_mask(unet: UNet2DConditionModel, vae: AutoencoderKL) -> bool:
    """Whether the U-Net is one for inpainting, which takes a mask and the masked latents as further channels."""
    return unet.config.in_channels == 2 * vae.config.latent_channels + 1


def check_fit(
    folder: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: Tokenizer
) -> None:
    """Raise a CheckpointError where the components of a folder do not belong together."""
    latent_channels, width = vae.config.latent_channels, unet.config.cross_attention_dim
    latent_inputs = latent_channels if takes_mask(unet, vae) else unet.config.in_channels
    pairs = [
        ("unet.in_channels", latent_inputs, "vae.latent_channels", latent_channels),
        ("unet.out_channels", unet.config.out_channels, "vae.latent_channels", latent_channels),
    ]
    text = text_encoder.config
    if isinstance(width, int):
        pairs.append(("unet.cross_attention_dim", width, "text_encoder.hidden_size", text.hidden_size))
    for left, left_value, right, right_value in pairs:
        if left_value != right_value:
            cause = f"{left}={left_value}, {right}={right_value}"
            raise CheckpointError(f"the parts of '{folder}' do not fit", cause)
    if tokenizer.vocab_size > text.vocab_size:
        cause = f"the tokenizer has {tokenizer.vocab_size} tokens, the text encoder {text.vocab_size}"
        raise CheckpointError(f"the parts of '{folder}' do not fit", cause)


def place(device: torch.device | str, precision: str, *modules: nn.Module) -> None:
    """Bring modules that are not trained to where and how they compute: in `fp32`, `bf16` or `fp16`."""
    for module in modules:
        module.requires_grad_(False).eval()
        module.to(device=device, dtype=_DTYPES[precision])
        # NHWC: a third faster on a CPU, and what tensor cores want.
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        tune_for_cpu(module)


def _text_config(mapping: Mapping[str, Any]) -> CLIPTextConfig:
    if "text_config" in mapping:
        return CLIPConfig.from_hugging_face(mapping).text_config
    return CLIPTextConfig.from_hugging_face(mapping)
