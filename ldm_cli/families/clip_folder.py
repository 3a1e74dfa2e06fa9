"""A whole CLIP as a folder holds it: both towers, the tokenizer, the image processor."""

from __future__ import annotations

from pathlib import Path

from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_config import CLIPConfig
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_vision import CLIPVisionTransformer
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError, RecipeError
from ldm_cli.families.clip_text_encoder import tokenizer_folder
from ldm_cli.formats.model_folder import load_model, outline_model, read_as, read_image_processor
from ldm_cli.formats.model_source import has_model_json
from ldm_cli.formats.pipeline_folder import INDEX_NAME
from ldm_cli.formats.weight_files import CONFIG_NAME
from ldm_cli.storage import resolve_model_folder


def outline_clip(folder: Path) -> CLIPModel:
    """The `outline_model` of a CLIPModel folder."""
    return outline_model(CLIPModel, folder)


def vision_transformer(clip: CLIPModel, field: str, folder: str) -> CLIPVisionTransformer:
    """The image tower of the CLIP in a folder that a field of a recipe names.

    Raises:
        RecipeError: it is a ResNet.
    """
    if not isinstance(clip.vision_model, CLIPVisionTransformer):
        raise RecipeError(
            f"{field}: '{folder}' cannot be used", "it has a ResNet for an image tower", "give a CLIP with a ViT"
        )
    return clip.vision_model


def open_clip(folder: Path) -> tuple[CLIPModel, Tokenizer, CLIPImageProcessor]:
    """Read a CLIPModel folder; errors as in `load_model`.

    Raises:
        CheckpointError: it is a pipeline, or as in `open_image_processor`.
    """
    if has_model_json(folder / INDEX_NAME):
        cause = "it is a pipeline, whose text encoder sees no pictures"
        remedy = "give a CLIP with a tower for pictures, too: a run of train-clip, or one of the hub"
        raise CheckpointError(f"no CLIP in '{folder}'", cause, remedy)
    model = load_model(CLIPModel, folder)
    return model, Tokenizer.load(tokenizer_folder(folder)), open_image_processor(folder)


def open_image_processor(folder: Path) -> CLIPImageProcessor:
    """The image processor of a CLIPModel folder; where it has none, OpenAI's. Errors as in `read_as`.

    Raises:
        CheckpointError: the image processor does not give images of the model's size.
    """
    config = read_as(CLIPConfig.from_hugging_face, resolve_model_folder(folder) / CONFIG_NAME)
    size = config.vision_config.image_size
    processor = read_image_processor(CLIPImageProcessor.from_hugging_face, folder)
    processor = CLIPImageProcessor.for_side(size) if processor is None else processor
    if processor.side != size:
        cause = f"its image processor does not give {size}x{size} px, which the model's image_size asks for"
        raise CheckpointError(f"cannot use '{folder}'", cause, "correct size and crop_size of preprocessor_config.json")
    return processor
