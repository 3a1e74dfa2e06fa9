"""Images for CLIP's image tower, prepared as transformers' CLIPImageProcessor prepares them (its Pillow backend)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.errors import CheckpointError
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.families.clip_folder import open_clip
from ldm_cli.formats.model_folder import read_image_processor
from ldm_cli.sampling.guidance_models import CLIPScore
from tests.sampling.test_guidance_models import tiny_clip_folder

transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")

# Where only the height shrinks, Pillow 13 resizes it first; earlier versions, and we, always begin with the width.
CONTENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no normalisation": {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]},
    "mean 0.5": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_convert_rgb": True},
    "one number for all channels": {"image_mean": 0.4, "image_std": 0.25},
    "numbers as sizes": {"size": 40, "crop_size": 30, "feature_extractor_type": "CLIPFeatureExtractor"},
    "both sides": {"size": {"height": 60, "width": 36}, "do_center_crop": False},
    "a pair of sides": {"size": [61, 30], "crop_size": {"height": 20, "width": 31}},
    "bilinear": {"size": {"shortest_edge": 24}, "resample": 2, "crop_size": {"height": 24, "width": 24}},
    "crop larger than image": {"size": {"shortest_edge": 20}, "crop_size": {"height": 37, "width": 45}},
    "crop larger on one side": {"do_resize": False, "crop_size": {"height": 50, "width": 51}},
    "no resizing": {"do_resize": False, "crop_size": {"height": 21, "width": 16}},
    "no cropping": {"size": {"shortest_edge": 20}, "do_center_crop": False},
    "other factor": {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
    "no rescaling": {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 61.0, 62.0]},
    "neither": {"do_rescale": False, "do_normalize": False},
    "rescaled only": {"do_normalize": False},
}


@pytest.mark.parametrize(("height", "width"), [(33, 57), (57, 33), (40, 40), (64, 47)])
@pytest.mark.parametrize("content", CONTENTS)
def test_pixels_equal_those_of_transformers(content: str, height: int, width: int) -> None:
    generator = np.random.default_rng(height)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = theirs.CLIPImageProcessorPil(**CONTENTS[content])(image, return_tensors="pt")["pixel_values"]
    processor = CLIPImageProcessor.from_hugging_face(CONTENTS[content])
    found = processor(torch.from_numpy(image).permute(2, 0, 1)[None])
    assert found.shape == expected.shape
    assert processor.side in (None, found.shape[2])
    scale = (processor.rescale_factor if processor.do_rescale else 1) / (
        min(processor.image_std) if processor.do_normalize else 1
    )
    levels = (found - expected.float()).abs() / scale
    assert levels.max() <= 1.001  # Pillow resizes with fixed-point weights
    assert (levels > 0.01).float().mean() <= 0.1


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config.json": CONTENTS["mean 0.5"]},
        {"processor_config.json": {"image_processor": CONTENTS["mean 0.5"], "processor_class": "CLIPProcessor"}},
        {
            "processor_config.json": {"image_processor": CONTENTS["bilinear"]},
            "preprocessor_config.json": CONTENTS["mean 0.5"],
        },
        {"processor_config.json": {"processor_class": "X"}, "preprocessor_config.json": CONTENTS["numbers as sizes"]},
    ],
)
def test_the_file_is_found_where_transformers_finds_it(files: dict[str, Any], tmp_path: Path) -> None:
    assert read_image_processor(CLIPImageProcessor.from_hugging_face, tmp_path) is None
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = read_image_processor(CLIPImageProcessor.from_hugging_face, tmp_path)
    expected = theirs.CLIPImageProcessorPil.from_pretrained(tmp_path).to_dict()
    assert found == CLIPImageProcessor.from_hugging_face(expected)
    assert found != CLIPImageProcessor()


def test_a_processor_that_is_not_implemented_is_refused_with_its_file(tmp_path: Path) -> None:
    for name, content in (("preprocessor_config.json", {"do_pad": True}), ("processor_config.json", {})):
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json': do_pad"):
        read_image_processor(CLIPImageProcessor.from_hugging_face, tmp_path)


def test_a_processor_of_openai_gives_its_side_and_normalises_each_channel() -> None:
    assert CLIPImageProcessor.for_side(224) == CLIPImageProcessor()
    assert CLIPImageProcessor.for_side(16).side == 16
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    found = CLIPImageProcessor.for_side(16)(images)
    for channel, (mean, std) in enumerate(zip(theirs.OPENAI_CLIP_MEAN, theirs.OPENAI_CLIP_STD, strict=True)):
        expected = (torch.arange(256, dtype=torch.float64) / 255 - mean) / std
        torch.testing.assert_close(found[1, channel].flatten(), expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("content", CONTENTS)
def test_a_processor_that_is_written_is_read_back_by_us_and_by_transformers(content: str) -> None:
    processor = CLIPImageProcessor.from_hugging_face(CONTENTS[content])
    written = json.loads(json.dumps(processor.to_hugging_face()))
    assert CLIPImageProcessor.from_hugging_face(written) == processor
    again = theirs.CLIPImageProcessorPil.from_dict(written).to_dict()
    assert CLIPImageProcessor.from_hugging_face(again) == processor


PREPROCESSORS = [
    {"image_mean": [0.0] * 3, "image_std": [1.0] * 3},
    {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2},
    {"do_normalize": False},
    {"size": {"height": 12, "width": 10}},
    {"size": 14, "do_rescale": False, "do_normalize": False},
]


@pytest.mark.parametrize("content", PREPROCESSORS)
def test_a_clip_sees_pictures_in_eval_and_in_guidance_as_its_folder_says(
    content: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny_clip_folder(tmp_path)
    whole = {"size": 8, "crop_size": 8} | content
    (folder / "preprocessor_config.json").write_text(json.dumps(whole))
    images = torch.randint(0, 256, (2, 3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = theirs.CLIPImageProcessorPil.from_pretrained(folder)(list(images.numpy()), return_tensors="pt")
    with torch.no_grad():
        expected = transformers.CLIPModel.from_pretrained(folder).get_image_features(pixels["pixel_values"])
        expected = getattr(expected, "pooler_output", expected)
    found = CLIPFeatures.load(folder, torch.device("cpu")).images(images)
    assert F.cosine_similarity(found, expected).min() > 0.9995
    plain = CLIPFeatures.load(folder, torch.device("cpu"))
    plain.processor = CLIPImageProcessor.for_side(8)
    assert F.cosine_similarity(plain.images(images), expected).min() < 0.999, "the file must matter"
    clip = CLIPScore(*open_clip(folder))
    prompts = ["a red circle", "a blue square"]
    score = clip.of(prompts, lambda latents: latents)(images / 127.5 - 1)
    texts = CLIPFeatures.load(folder, torch.device("cpu")).texts(prompts)
    assert torch.allclose(score, F.cosine_similarity(expected, texts), atol=0.02)


@pytest.mark.parametrize(
    "content", [{"crop_size": 16}, {"do_center_crop": False}, {"do_resize": False, "do_center_crop": False}]
)
def test_a_processor_of_another_size_than_the_model_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_clip_folder(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 8, "crop_size": 8} | content))
    with pytest.raises(CheckpointError, match="its image processor does not give 8x8 px"):
        open_clip(folder)


def test_a_pipeline_is_no_clip_and_the_error_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no CLIP in .*: it is a pipeline, .*; give a CLIP with a tower"):
        open_clip(tmp_path)


def test_gradients_reach_the_pixels() -> None:
    images = (torch.rand(1, 3, 40, 50) * 255).requires_grad_()
    CLIPImageProcessor.from_hugging_face({"size": 20, "crop_size": 20})(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"resample": 1}, "resample"),
        ({"resample": 0}, "resample"),
        ({"do_pad": True}, "do_pad"),
        ({"size": {"longest_edge": 224}}, "size"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "size"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(content: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CLIPImageProcessor.from_hugging_face(content)
    assert {error["loc"][0] for error in caught.value.errors()} == {field}
