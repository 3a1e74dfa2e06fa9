"""Autoencoders as folders hold them: which class a `vae` folder is of."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_tiny import AutoencoderTiny
from ldm_cli.core.precision import DTYPES
from ldm_cli.formats.model_folder import load_model, outline_model, read_config

Autoencoder = AutoencoderKL | AutoencoderTiny


def open_codec(folder: Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """Read an autoencoder of either class, in a type; errors as in `load_model`."""
    if _is_tiny(folder):
        return load_model(AutoencoderTiny, folder, dtype=dtype)
    return load_model(AutoencoderKL, folder, dtype=dtype)


def codec_dtype(precision: str) -> torch.dtype:
    """The type in which a family reads its autoencoder: not fp16, for `force_upcast` may keep it in fp32."""
    return torch.float32 if precision == "fp16" else DTYPES[precision]


def outline_codec(folder: Path) -> Autoencoder:
    """The `outline_model` of either class."""
    return outline_model(AutoencoderTiny, folder) if _is_tiny(folder) else outline_model(AutoencoderKL, folder)


def _is_tiny(folder: Path) -> bool:
    return read_config(folder).get("_class_name") == AutoencoderTiny.__name__
