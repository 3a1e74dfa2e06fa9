"""The tiny autoencoder as a codec of a pipeline, against diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_cli.core.models.autoencoder_tiny import AutoencoderTiny
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from tests.parity import test_editing as editing
from tests.parity.their_pipeline import NEGATIVE, PROMPTS, latents, scheduler, their_folder
from tests.sampling.tiny import loaded_pipeline, randomize

diffusers = pytest.importorskip("diffusers")


def folder_with_a_tiny_autoencoder(folder: Path) -> Path:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        their_folder(folder, scheduler("ddim")), safety_checker=None
    )
    sides = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    tiny = diffusers.AutoencoderTiny(**sides, num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1), scaling_factor=0.7)
    pipeline.register_modules(vae=randomize(tiny, 9))
    pipeline.save_pretrained(folder / "tiny")
    return folder / "tiny"


def ours(folder: Path) -> Tensor:
    config = SamplingConfig.from_mapping({"steps": 4, "guidance": 4.0, "negative": NEGATIVE})
    requests = [ImageRequest(prompt, 0) for prompt in PROMPTS]
    return torch.stack([image.pixels for image in loaded_pipeline(folder).generate(requests, config, latents())])


def theirs(folder: Path) -> Tensor:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "guidance_scale": 4.0, "negative_prompt": [NEGATIVE] * 2}
    images = pipeline(PROMPTS, latents=latents(), output_type="np", **given).images
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


def test_a_pipeline_with_a_tiny_autoencoder_is_sampled_and_written_as_diffusers_does(tmp_path: Path) -> None:
    folder = folder_with_a_tiny_autoencoder(tmp_path)
    assert isinstance(outline_family(folder)["vae"], AutoencoderTiny)
    found = ours(folder)
    open_family(folder).save(tmp_path / "written")
    for one in (folder, tmp_path / "written"):
        expected = theirs(one)
        assert expected.float().std() > 10, "flat pictures prove nothing"
        assert (found.int() - expected.int()).abs().max() <= 2


def test_it_encodes_a_picture_to_work_on_as_diffusers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with_a_tiny_autoencoder(tmp_path)
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
    kind = diffusers.StableDiffusionImg2ImgPipeline
    expected = editing.theirs(kind, folder, monkeypatch, module, "euler", 0.5)
    assert (editing.ours(folder, "euler", 0.5, None).int() - expected.int()).abs().max() <= 2
