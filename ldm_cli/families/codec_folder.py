"""Autoencoders as folders hold them: which class a `vae` folder is of."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.autoencoder_tiny import AutoencoderTiny
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.core.models.vq_model_config import VQModelConfig
from ldm_cli.core.precision import DTYPES
from ldm_cli.formats.model_folder import ModelClass, load_model, outline_model, read_config

Autoencoder = AutoencoderKL | AutoencoderTiny | VQModel
AutoencoderConfig = AutoencoderKLConfig | VQModelConfig
"""Of the autoencoders that are trained here."""
_CLASSES: dict[object, ModelClass[Autoencoder]] = {"AutoencoderTiny": AutoencoderTiny, "VQModel": VQModel}


def trained_class(config: AutoencoderConfig) -> ModelClass[AutoencoderKL | VQModel]:
    """The class of an autoencoder that is trained here, by its configuration."""
    return VQModel if isinstance(config, VQModelConfig) else AutoencoderKL


def open_codec(folder: Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """Read an autoencoder of any of the classes, in a type; errors as in `load_model`."""
    return load_model(_class_of(folder), folder, dtype=dtype)


def codec_dtype(precision: str) -> torch.dtype:
    """The type in which a family reads its autoencoder: not fp16, for `force_upcast` may keep it in fp32."""
    return torch.float32 if precision == "fp16" else DTYPES[precision]


def outline_codec(folder: Path) -> Autoencoder:
    """The `outline_model` of any of the classes."""
    return outline_model(_class_of(folder), folder)


def _class_of(folder: Path) -> ModelClass[Autoencoder]:
    return _CLASSES.get(read_config(folder).get("_class_name"), AutoencoderKL)
