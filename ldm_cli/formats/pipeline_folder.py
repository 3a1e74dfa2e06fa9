"""The layout of a pipeline folder of diffusers: its index and its components."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_cli.formats.json_file import write_json

DIFFUSERS_VERSION = "0.42.1"
"""The release of diffusers whose files we write."""
INDEX_NAME = "model_index.json"
PRIOR_PIPELINE = "KandinskyV22PriorPipeline"
"""The pipeline of a prior alone."""
UNET, TRANSFORMER, VAE, SCHEDULER, TOKENIZER = "unet", "transformer", "vae", "scheduler", "tokenizer"
SCHEDULER_FILE = Path(SCHEDULER) / "scheduler_config.json"
TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3 = "text_encoder", "text_encoder_2", "text_encoder_3"
PRIOR, PRIOR_PREFIX, IMAGE_NORMALIZER = "prior", "prior_", "image_normalizer"
IMAGE_ENCODER, FEATURE_EXTRACTOR, IMAGE_PROCESSOR = "image_encoder", "feature_extractor", "image_processor"
ZEROES_EMPTY = "force_zeros_for_empty_prompt"
"""Setting of the index: the condition of the empty prompt is zeros."""
CLIP_SKIP = "clip_skip"
"""Setting of the index, ours: the layer of the text towers that the model was trained with, as in `PromptReading`."""

MAX_SEQUENCE_LENGTH = "max_sequence_length"
"""Setting of the index, ours: tokens of T5 that the model was trained with, by the name of diffusers' argument."""


def tokenizer_of(text_encoder: str) -> str:
    """The component with the tokenizer of a text encoder: `text_encoder_2` → `tokenizer_2`."""
    return text_encoder.replace(TEXT_ENCODER, TOKENIZER)


def write_index(folder: Path, pipeline: str, classes: Mapping[str, str | None], settings: Mapping[str, Any]) -> None:
    """Write model_index.json.

    Args:
        pipeline: its class in diffusers.
        classes: of each component, by subfolder; None: the pipeline is without it.
        settings: further arguments of the pipeline.

    Raises:
        StorageError: writing failed.
    """
    content = {
        "_class_name": pipeline,
        "_diffusers_version": DIFFUSERS_VERSION,
        **{name: [_library(kind), kind] for name, kind in classes.items()},
        **settings,
    }
    write_json(folder / INDEX_NAME, content)


def _library(kind: str | None) -> str | None:
    """The library that has a class."""
    if kind is None:
        return None
    if kind == "StableUnCLIPImageNormalizer":
        return "stable_diffusion"
    return "transformers" if kind.startswith(("CLIP", "T5", "Llama")) else "diffusers"
