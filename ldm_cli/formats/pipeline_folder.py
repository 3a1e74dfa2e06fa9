"""The layout of a Stable Diffusion pipeline folder: its index and its components."""

from __future__ import annotations

from pathlib import Path

from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.scheduler_file import DIFFUSERS_VERSION, SchedulerSettings

INDEX_NAME = "model_index.json"
UNET, VAE, TEXT_ENCODER, TOKENIZER = "unet", "vae", "text_encoder", "tokenizer"
PIPELINE_CLASS = "StableDiffusionPipeline"


def write_index(folder: Path, settings: SchedulerSettings) -> None:
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
        "scheduler": ["diffusers", settings.scheduler_class],
        TEXT_ENCODER: ["transformers", "CLIPTextModel"],
        TOKENIZER: ["transformers", "CLIPTokenizer"],
        UNET: ["diffusers", "UNet2DConditionModel"],
        VAE: ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / INDEX_NAME, content)
