"""Autoencoders as folders hold them: which class a `vae` folder is of."""

from __future__ import annotations

from pathlib import Path

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_tiny import AutoencoderTiny
from ldm_cli.formats.model_folder import load_model, outline_model, read_config

Autoencoder = AutoencoderKL | AutoencoderTiny


def open_codec(folder: Path) -> Autoencoder:
    """Read an autoencoder of either class; errors as in `load_model`."""
    return load_model(_class_of(folder), folder)


def outline_codec(folder: Path) -> Autoencoder:
    """The `outline_model` of either class."""
    return outline_model(_class_of(folder), folder)


def _class_of(folder: Path) -> type[Autoencoder]:
    is_tiny = read_config(folder).get("_class_name") == "AutoencoderTiny"
    return AutoencoderTiny if is_tiny else AutoencoderKL
