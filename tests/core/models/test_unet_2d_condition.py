from __future__ import annotations

import math
from dataclasses import replace
from operator import itemgetter
from typing import Any

import pytest
import torch

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.attention import image_of, tokens_of
from ldm_cli.core.models.layers import timestep_embedding
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig

from .weights import golden_shapes, gradients, num_parameters, randomise, shapes

SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def small(**changes: Any) -> UNet2DConditionModel:
    model = UNet2DConditionModel(UNet2DConditionConfig(**SMALL | changes))
    randomise(model)
    return model


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    torch.manual_seed(1)
    return torch.randn(batch, 4, 8, 6), torch.linspace(1, 900, batch), Condition(tokens=torch.randn(batch, 5, 32))


def test_parameter_names_and_shapes_are_the_published_ones() -> None:
    assert shapes(small()) == golden_shapes("unet_2d_condition")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cross_attention_dim": 768}, 859_520_964),
        (
            {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
            865_910_724,
        ),
        (
            {
                "block_out_channels": (320, 640, 1280),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": (5, 10, 20),
                "transformer_layers_per_block": (1, 2, 10),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            2_567_463_684,
        ),
    ],
    ids=["stable diffusion 1", "stable diffusion 2", "stable diffusion xl"],
)
def test_published_sizes_have_the_published_number_of_parameters(changes: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(UNet2DConditionConfig(**changes))
    assert num_parameters(model) == expected


def test_a_model_made_on_the_meta_device_can_be_filled_and_run() -> None:
    original = small()
    with torch.device("meta"):
        copy = UNet2DConditionModel(original.config)
    copy.to_empty(device="cpu").load_state_dict(original.state_dict())
    assert torch.equal(copy(*inputs()), original(*inputs()))


def test_the_timestep_embedding_is_the_published_formula() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 7.5]), 6, flip_sin_to_cos=True, freq_shift=0)
    angles = [7.5 / 10000 ** (i / 3) for i in range(3)]
    expected = torch.tensor([[1.0] * 3 + [0.0] * 3, [*map(math.cos, angles), *map(math.sin, angles)]])
    torch.testing.assert_close(embedding, expected)
    swapped = timestep_embedding(torch.tensor([7.5]), 6, flip_sin_to_cos=False, freq_shift=1)
    angles = [7.5 / 10000 ** (i / 2) for i in range(3)]
    torch.testing.assert_close(swapped, torch.tensor([[*map(math.sin, angles), *map(math.cos, angles)]]))


def test_images_and_tokens_are_inverse_views() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    back = image_of(tokens_of(x), 4, 5)
    assert torch.equal(back, x)
    assert back.data_ptr() == x.data_ptr()
    assert back.stride() == x.stride()


def test_a_new_network_predicts_zero_and_starts_to_learn_at_its_last_layer() -> None:
    model = UNet2DConditionModel(UNet2DConditionConfig(**SMALL))
    assert torch.equal(model(*inputs()), torch.zeros(2, 4, 8, 6))
    model(*inputs()).sum().backward()
    assert model.conv_out.weight.grad.abs().max() > 0


def test_every_parameter_takes_part() -> None:
    model = small(num_class_embeds=3)
    sample, timestep, condition = inputs()
    found = gradients(model, sample, timestep, replace(condition, pooled=torch.tensor([0, 2])))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_gradient_checkpointing_leaves_gradients_as_they_are() -> None:
    model = small()
    expected = gradients(model, *inputs())
    model.enable_gradient_checkpointing()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        actual = gradients(model, *inputs())
    num_kept = len(kept)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    model.enable_gradient_checkpointing(False)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        model(*inputs())
    assert num_kept < len(kept) / 2


def test_channels_last_changes_memory_order_only() -> None:
    model = small()
    sample, timestep, condition = inputs()
    expected = model(sample, timestep, condition)
    model.to(memory_format=torch.channels_last)
    actual = model(sample.to(memory_format=torch.channels_last), timestep, condition)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_one_another() -> None:
    model = small()
    sample, timestep, condition = inputs(batch=3)
    together = model(sample, timestep, condition)
    for i in range(3):
        row = itemgetter(slice(i, i + 1))
        alone = model(row(sample), row(timestep), condition.map(row))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_a_network_in_bf16_answers_in_bf16() -> None:
    sample, timestep, condition = inputs()
    model = small()
    expected = model(sample, timestep, condition)
    actual = model.bfloat16()(sample.bfloat16(), timestep, condition.map(torch.Tensor.bfloat16))
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_a_plain_network_needs_no_text() -> None:
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = small(**plain, mid_block_type="UNetMidBlock2D")
    assert model(torch.randn(1, 4, 8, 8), torch.tensor([3.0]), Condition()).shape == (1, 4, 8, 8)


TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
}


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({}, {"tokens": None}, "condition.tokens is missing"),
        ({"num_class_embeds": 3}, {}, "condition.pooled is missing.* num_class_embeds=3"),
        (TEXT_TIME, {}, "condition.pooled is missing.* addition_embed_type=text_time"),
        (
            {},
            {"pooled": torch.tensor([0, 1])},
            "condition.pooled is given, but the network has no field that asks for it",
        ),
        ({}, {"guidance": torch.ones(2, 8)}, "condition.guidance is given.* time_cond_proj_dim=None"),
        ({}, {"image_tokens": torch.ones(2, 1, 32)}, "condition.image_tokens is given"),
        ({}, {"concat": torch.ones(2, 1, 8, 6)}, "5 channels in x and condition.concat, but in_channels=4"),
    ],
)
def test_a_missing_or_unused_condition_is_an_error(
    changes: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    sample, t, condition = inputs()
    with pytest.raises(ValueError, match=message):
        small(**changes)(sample, t, replace(condition, **fields))


@torch.no_grad()
def test_concat_is_joined_to_the_noisy_latent_as_further_channels() -> None:
    model = small(in_channels=9)
    sample, t, condition = inputs()
    concat = torch.randn(2, 5, 8, 6)
    seen: list[torch.Tensor] = []
    model.conv_in.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(sample, t, replace(condition, concat=concat))
    assert torch.equal(seen[0], torch.cat([sample, concat], dim=1))
    with pytest.raises(ValueError, match=r"4 channels in x and condition\.concat, but in_channels=9"):
        model(sample, t, condition)


@torch.no_grad()
def test_the_number_of_sizes_follows_from_the_widths() -> None:
    """16 text features and 3 sizes of 8 sinusoids each are 40 numbers, and so are 32 features and 1 size."""
    embedding = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    model = small(**embedding, projection_class_embeddings_input_dim=40)
    sample, t, condition = inputs()
    seen: list[torch.Tensor] = []
    model.add_embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for num_sizes, width in ((3, 16), (1, 32), (0, 40)):
        text, sizes = torch.randn(2, width), torch.rand(2, num_sizes) * 1024
        model(sample, t, replace(condition, pooled=torch.cat([text, sizes], dim=1)))
        sinusoids = [timestep_embedding(s, 8, flip_sin_to_cos=True, freq_shift=0) for s in sizes.T]
        assert torch.equal(seen[-1], torch.cat([text, *sinusoids], dim=1))
    with pytest.raises(ValueError, match="has 20 numbers, but addition_time_embed_dim=8"):
        model(sample, t, replace(condition, pooled=torch.randn(2, 20)))
