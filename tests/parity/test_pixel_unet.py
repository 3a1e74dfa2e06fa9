"""The layers of U-Nets of pixels, against diffusers: random configurations, the layout of IF, thresholding."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import ThresholdConfig
from ldm_cli.core.diffusion.guidance import thresholded
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig

from .test_models import assert_close, assert_same_weights

diffusers = pytest.importorskip("diffusers")

DOWN = {
    "UpBlock2D": "DownBlock2D",
    "CrossAttnUpBlock2D": "CrossAttnDownBlock2D",
    "AttnUpBlock2D": "AttnDownBlock2D",
    "ResnetUpsampleBlock2D": "ResnetDownsampleBlock2D",
    "SimpleCrossAttnUpBlock2D": "SimpleCrossAttnDownBlock2D",
}


def random_pixel_unet(choose: random.Random) -> dict[str, Any]:
    levels = choose.choice([2, 3])
    up = [choose.choice(list(DOWN)) for _ in range(levels)]
    mid = choose.choice(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"])
    config: dict[str, Any] = {
        "in_channels": choose.choice([3, 6]),
        "out_channels": 6,
        "block_out_channels": tuple(choose.choice([16, 32]) for _ in range(levels)),
        "down_block_types": tuple(DOWN[choose.choice(list(DOWN))] for _ in range(levels)),
        "up_block_types": tuple(up),
        "mid_block_type": mid,
        "layers_per_block": choose.choice([1, 2]),
        "attention_head_dim": choose.choice([4, 8]),
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
        "act_fn": choose.choice(["silu", "gelu", "swish"]),
        "resnet_time_scale_shift": choose.choice(["default", "scale_shift"]),
    }
    if choose.random() < 0.5:
        config |= {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"}
    if choose.random() < 0.5:
        config |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    return config | choose.choice([{}, {"class_embed_type": "timestep"}, {"num_class_embeds": 5}])


@pytest.mark.parametrize("seed", range(16))
def test_a_unet_of_pixels_equals_that_of_diffusers(seed: int) -> None:
    choose = random.Random(seed)
    config = UNet2DConditionConfig(**random_pixel_unet(choose))
    torch.manual_seed(seed)
    ours = UNet2DConditionModel(config)
    theirs = diffusers.UNet2DConditionModel.from_config(config.to_hugging_face())
    assert_same_weights(ours, theirs)
    sample, tokens = torch.randn(2, config.in_channels, 8, 12), torch.randn(2, 5, config.text_width)
    labels = torch.tensor([2, 3]) if config.pooled_fields else None
    with torch.no_grad():
        actual = ours(sample, torch.tensor([40.0, 700.0]), Condition(tokens=tokens, pooled=labels))
        given = {"encoder_hidden_states": tokens, "class_labels": labels}
        expected = theirs(sample, torch.tensor([40.0, 700.0]), **given).sample
    assert_close(actual, expected)


def test_the_random_unets_cover_every_option() -> None:
    found = [random_pixel_unet(random.Random(seed)) for seed in range(16)]
    assert {kind for config in found for kind in config["down_block_types"]} == set(DOWN.values())
    assert {kind for config in found for kind in config["up_block_types"]} == set(DOWN)
    for name, count in (("mid_block_type", 3), ("act_fn", 3), ("resnet_time_scale_shift", 2), ("encoder_hid_dim", 1)):
        assert len({config[name] for config in found if name in config}) == count, name
    for name in ("addition_embed_type", "class_embed_type", "num_class_embeds"):
        assert 0 < sum(name in config for config in found) < len(found), name


@pytest.mark.parametrize("most", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("share", [0.7, 0.95, 1.0])
def test_thresholding_equals_that_of_diffusers(share: float, most: float) -> None:
    x0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.2, 1, 2, 5]).view(
        -1, 1, 1, 1
    )
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=share, sample_max_value=most)
    expected = scheduler._threshold_sample(x0)
    torch.testing.assert_close(thresholded(x0, ThresholdConfig(percentile=share, max_scale=most)), expected)


def test_a_new_unet_begins_as_its_shortcuts() -> None:
    config = UNet2DConditionConfig(**random_pixel_unet(random.Random(3)))
    assert all(
        bool((parameter == 0).all())
        for name, parameter in UNet2DConditionModel(config).named_parameters()
        if name.endswith(("conv2.weight", "to_out.0.weight", "conv_out.weight")) and "transformer_blocks" not in name
    )
