"""Stable Diffusion XL against diffusers: its folders in ours, ours in its pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from tests.parity.their_pipeline import PROMPTS, latents
from tests.parity.xl_pipeline import their_xl_folder
from tests.sampling.tiny import loaded_pipeline

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SMALL = {"original": [40, 30], "crop": [3, 7], "target": [32, 16]}
LARGE = {"original": [900, 1200], "crop": [0, 0], "target": [1024, 1024]}


def ours(folder: Path, **fields: Any) -> Tensor:
    config = SamplingConfig.from_mapping({"steps": 5, "guidance": 4.0, "sampler": "euler"} | fields)
    requests = [ImageRequest(prompt, 0) for prompt in PROMPTS]
    return torch.stack([image.pixels for image in loaded_pipeline(folder).generate(requests, config, latents())])


def theirs(folder: Path, **given: Any) -> Tensor:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 16, "width": 16} | given
    images = pipeline(PROMPTS, latents=latents(), output_type="np", **given).images
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


def their_sizes(sizes: dict[str, list[int]], prefix: str = "") -> dict[str, tuple[int, ...]]:
    names = {"original": "original_size", "crop": "crops_coords_top_left", "target": "target_size"}
    return {prefix + names[name]: tuple(value) for name, value in sizes.items()}


def assert_alike(found: Tensor, expected: Tensor) -> None:
    assert expected.float().std() > 10, "flat pictures prove nothing"
    assert (found.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("seed", range(4))
def test_their_folder_is_sampled_as_their_pipeline_samples_it(tmp_path: Path, seed: int) -> None:
    folder = their_xl_folder(tmp_path, seed)
    assert_alike(ours(folder), theirs(folder))


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_pictures_are_conditioned_on_the_sizes_that_are_asked_for(tmp_path: Path, sizes: dict[str, list[int]]) -> None:
    folder = their_xl_folder(tmp_path)
    found = ours(folder, sizes=sizes)
    assert_alike(found, theirs(folder, **their_sizes(sizes)))
    assert not torch.equal(found, ours(folder))
