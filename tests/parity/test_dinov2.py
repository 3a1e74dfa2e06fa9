"""DINOv2 and its image processor against transformers: same folders, same features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm_cli.core.models.dinov2 import Dinov2Model
from ldm_cli.core.models.dinov2_config import Dinov2Config
from ldm_cli.evaluation.dinov2_features import DINOv2Features
from ldm_cli.formats.model_folder import load_model
from tests.core.models.weights import num_parameters

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28, "patch_size": 7}
PUBLISHED: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 384, "num_attention_heads": 6},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "giant": {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
}


def theirs(folder: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**{**TINY, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("side", [28, 42])
@pytest.mark.parametrize("changes", [{}, {"use_swiglu_ffn": True}, {"qkv_bias": False, "mlp_ratio": 2}])
@torch.no_grad()
def test_features_are_those_of_transformers(changes: dict[str, Any], side: int, tmp_path: Path) -> None:
    model = theirs(tmp_path, **changes)
    pixels = torch.randn(3, 3, side, side + 7)
    expected = model(pixels).pooler_output
    assert (load_model(Dinov2Model, tmp_path)(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_pictures_are_prepared_by_the_image_processor_of_the_folder(tmp_path: Path) -> None:
    model = theirs(tmp_path)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    processor = transformers.BitImageProcessorPil(**sizes, image_mean=[0.485, 0.456, 0.406], image_std=[0.2, 0.3, 0.4])
    processor.save_pretrained(tmp_path)
    pictures = [torch.randint(256, (3, 40, width), dtype=torch.uint8) for width in (50, 50, 64)]
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    with torch.no_grad():
        expected = model(**processor(images, return_tensors="pt")).pooler_output
    found = DINOv2Features(tmp_path, torch.device("cpu"))(pictures)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(size: str) -> None:
    fields = {**PUBLISHED[size], "image_size": 518}
    with torch.device("meta"):
        ours = Dinov2Model(Dinov2Config.from_mapping(fields))
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**fields))
    assert num_parameters(ours) == num_parameters(theirs)
