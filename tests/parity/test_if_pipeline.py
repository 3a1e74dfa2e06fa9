"""A folder in the layout of DeepFloyd IF, written by diffusers, whose pictures are those of its pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ldm_cli.errors import CheckpointError
from ldm_cli.families.open_family import open_family
from ldm_cli.families.pixel_diffusion import PixelDiffusion
from ldm_cli.families.t5_encoder import T5Encoder
from ldm_cli.formats.scheduler_file import read_scheduler
from tests.sampling.tiny import randomize
from tests.stages.test_train_pixels import pictures, same_noise, their_pictures
from tests.stages.tiny_sd3 import WIDTH, save_tiny_sd3

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
__all__ = ["same_noise"]

UNET = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (16, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "norm_num_groups": 4,
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim": WIDTH,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
}
SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}


@pytest.mark.parametrize(
    "scheduler",
    [
        SCHEDULER,
        SCHEDULER | {"variance_type": "learned_range"},
        {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True},
        {"clip_sample": False, "prediction_type": "v_prediction"},
    ],
    ids=["dynamic", "learned", "clipped", "plain"],
)
def test_a_folder_of_if_gives_the_pictures_of_its_pipeline(
    tmp_path: Path, same_noise: torch.Tensor, monkeypatch: pytest.MonkeyPatch, scheduler: dict[str, object]
) -> None:
    text = Path(save_tiny_sd3(tmp_path / "parts")["text_encoder_3"])
    tokenizer = text if (text / "tokenizer.json").is_file() else text.parent / "tokenizer_3"
    pipeline = diffusers.IFPipeline(
        tokenizer=transformers.T5TokenizerFast.from_pretrained(tokenizer),
        text_encoder=transformers.T5EncoderModel.from_pretrained(text),
        unet=randomize(diffusers.UNet2DConditionModel(**UNET), 3),
        scheduler=diffusers.DDPMScheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path / "if")
    family = open_family(tmp_path / "if")
    assert isinstance(family, PixelDiffusion)
    assert isinstance(family.encoder, T5Encoder)
    assert family.encoder.length == 77
    if scheduler.get("variance_type"):  # a learned variance is read as the fixed one, as the classes of ODE solvers do
        file = tmp_path / "if/scheduler/scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"variance_type": "fixed_small"}))
    prompts = ["A red circle ", "a small blue square"]
    ours = pictures(family, prompts, same_noise, guidance=5.0)
    theirs = their_pictures(tmp_path / "if", prompts, guidance_scale=5.0)
    assert theirs.float().std() > 10, "flat pictures prove nothing"
    assert (ours.int() - theirs.int()).abs().max() <= 2


def test_a_scheduler_that_clips_elsewhere_is_refused(tmp_path: Path) -> None:
    diffusers.DDPMScheduler(clip_sample_range=2.0).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(CheckpointError, match=r"clip_sample_range=2\.0 is not supported"):
        read_scheduler(tmp_path, "IFPipeline")
