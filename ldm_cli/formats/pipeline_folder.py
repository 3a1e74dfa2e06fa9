"""The layout of a Stable Diffusion pipeline folder: its index and its components."""

from __future__ import annotations

from pathlib import Path

from ldm_cli.formats.json_file import write_json

DIFFUSERS_VERSION = "0.42.1"
"""The release of diffusers whose files we write."""
INDEX_NAME = "model_index.json"
SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"
UNET, VAE, TEXT_ENCODER, TEXT_ENCODER_2 = "unet", "vae", "text_encoder", "text_encoder_2"
TOKENIZER = "tokenizer"
PIPELINE_CLASS = "StableDiffusionPipeline"


def write_index(folder: Path, scheduler_class: str) -> None:
    """Write model_index.json for `StableDiffusionPipeline.from_pretrained`, without safety checker.

    Raises:
        StorageError: writing failed.
    """
    content = {
        "_class_name": PIPELINE_CLASS,
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        TEXT_ENCODER: ["transformers", "CLIPTextModel"],
        TOKENIZER: ["transformers", "CLIPTokenizer"],
        UNET: ["diffusers", "UNet2DConditionModel"],
        VAE: ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / INDEX_NAME, content)
