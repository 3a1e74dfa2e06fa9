"""What `train-unet` adds to text for a denoiser of pixels: class labels, and which U-Nets take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.data.batch import Batch
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.label_encoder import LabelEncoder
from ldm_cli.families.latent_diffusion import TextEncoder
from ldm_cli.families.pixel_diffusion import text_problems, unet_problems
from ldm_cli.families.t5_encoder import T5Encoder
from ldm_cli.recipe.schema import TrainUnetRecipe


def with_classes(text: TextEncoder | None, recipe: TrainUnetRecipe, device: torch.device) -> TextEncoder | LabelEncoder:
    """The text encoder of a recipe, or what encodes its classes, with the text beside them if there is some.

    Args:
        text: the text encoder; None: there are only classes.
    """
    if recipe.classes is None:
        assert text is not None  # the recipe's own check
        return text
    assert text is None or isinstance(text, CLIPTextEncoder | T5Encoder)  # likewise
    return LabelEncoder(recipe.classes, text, device)


def prompts_of_batch(batch: Batch, recipe: TrainUnetRecipe) -> list[str]:
    """The captions of a batch; where there is no text, the names of its classes."""
    if recipe.classes is None or recipe.text_encoder or batch.labels is None:
        return batch.captions
    return [recipe.classes[label] for label in batch.labels.tolist()]


def pixel_problems(unet: UNet2DConditionConfig, texts: Sequence[nn.Module], *, enlarges: bool) -> list[str]:
    """What keeps a U-Net from being trained on pixels.

    Args:
        texts: the text encoder, on any device; none, if there are only classes.
        enlarges: whether it is given small pictures.
    """
    if not texts:
        attends = ["the U-Net attends to text: give text_encoder, or blocks without"]
        return unet_problems(unet, enlarges=enlarges) + (attends if unet.levels_with_text() else [])
    config: Any = texts[0].config
    return unet_problems(unet, enlarges=enlarges) + text_problems(unet, config.hidden_size)
