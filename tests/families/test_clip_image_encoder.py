"""CLIP's image tower with projection, out of every folder that may hold one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_config import CLIPConfig
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS
from tests.stages.tiny import RESNET, VIT

IMAGES = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def save_clip(folder: Path, vision: dict[str, object]) -> CLIPModel:
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig.from_mapping({"vision_config": vision, "text_config": text, "projection_dim": 12}))
    save_model(folder, clip.state_dict(), clip.config.to_hugging_face(), TRANSFORMERS_WEIGHTS)
    return clip.eval()


def test_the_embeddings_are_those_of_the_whole_clip(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip", VIT)
    encoder = CLIPImageEncoder.load(tmp_path / "clip")
    assert encoder.width == 12
    with torch.no_grad():
        torch.testing.assert_close(encoder(IMAGES), clip.get_image_features(encoder.processor(IMAGES)))


def test_transformers_reads_the_folder_and_gives_the_same_embeddings(tmp_path: Path) -> None:
    save_clip(tmp_path / "clip", VIT)
    encoder = CLIPImageEncoder.load(tmp_path / "clip")
    encoder.save(tmp_path / "pipeline")
    model = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "pipeline/image_encoder")
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "pipeline/feature_extractor")
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in IMAGES]
    with torch.no_grad():
        expected = model(**processor(pictures, return_tensors="pt")).image_embeds
        found = CLIPImageEncoder.load(tmp_path / "pipeline/image_encoder")(IMAGES)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_a_resnet_is_refused(tmp_path: Path) -> None:
    save_clip(tmp_path, RESNET)
    with pytest.raises(CheckpointError, match="its image tower is a ResNet"):
        CLIPImageEncoder.load(tmp_path)
