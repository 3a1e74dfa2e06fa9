"""Autoencoders as folders hold them: which class a `vae` folder is of."""

from __future__ import annotations

from pathlib import Path

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_tiny import AutoencoderTiny
from ldm_cli.formats.model_folder import load_model, outline_model, read_config

Autoencoder = AutoencoderKL | AutoencoderTiny


def open_codec(folder: Path) -> Autoencoder:
    """Read an autoencoder of either class; errors as in `load_model`."""
    return load_model(AutoencoderTiny, folder) if _is_tiny(folder) else load_model(AutoencoderKL, folder)


def outline_codec(folder: Path) -> Autoencoder:
    """The `outline_model` of either class."""
    return outline_model(AutoencoderTiny, folder) if _is_tiny(folder) else outline_model(AutoencoderKL, folder)


def _is_tiny(folder: Path) -> bool:
    return read_config(folder).get("_class_name") == AutoencoderTiny.__name__
