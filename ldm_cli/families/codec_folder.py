"""Autoencoders as folders hold them: which class a `vae` folder is of."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_tiny import AutoencoderTiny
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.core.precision import DTYPES
from ldm_cli.formats.model_folder import load_model, outline_model, read_config

Autoencoder = AutoencoderKL | AutoencoderTiny | VQModel
_CLASSES: dict[object, type[Autoencoder]] = {one.__name__: one for one in (AutoencoderTiny, VQModel)}


def open_codec(folder: Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """Read an autoencoder of any of the classes, in a type; errors as in `load_model`."""
    return load_model(_class_of(folder), folder, dtype=dtype)


def codec_dtype(precision: str) -> torch.dtype:
    """The type in which a family reads its autoencoder: not fp16, for `force_upcast` may keep it in fp32."""
    return torch.float32 if precision == "fp16" else DTYPES[precision]


def outline_codec(folder: Path) -> Autoencoder:
    """The `outline_model` of any of the classes."""
    return outline_model(_class_of(folder), folder)


def _class_of(folder: Path) -> type[Autoencoder]:
    return _CLASSES.get(read_config(folder).get("_class_name"), AutoencoderKL)
