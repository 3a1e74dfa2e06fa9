from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ldm_cli.core.models.clip import CLIPModel, CLIPTextModel, CLIPVisionModel
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from ldm_cli.core.models.clip_transformer import CLIPMLP

from .weights import golden_shapes, num_parameters, randomise, shapes


def text_config(**changes: Any) -> CLIPTextConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    return CLIPTextConfig(**sizes | changes)


def vision_config(**changes: Any) -> CLIPVisionConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return CLIPVisionConfig(**sizes | changes)


def small_clip() -> CLIPModel:
    model = CLIPModel(CLIPConfig(text_config=text_config(), vision_config=vision_config(), projection_dim=16))
    randomise(model)
    return model


def test_parameter_names_and_shapes_are_the_published_ones() -> None:
    assert shapes(small_clip()) == golden_shapes("clip_model")
    text = text_config(intermediate_size=37, num_hidden_layers=2)
    assert shapes(CLIPTextModel(text)) == golden_shapes("clip_text_model")


def test_published_sizes_have_the_published_number_of_parameters() -> None:
    large = CLIPConfig(
        projection_dim=768,
        text_config=CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
        ),
    )
    with torch.device("meta"):
        assert num_parameters(CLIPModel(CLIPConfig())) == 151_277_313
        assert num_parameters(CLIPModel(large)) == 427_616_513


def test_a_model_made_on_the_meta_device_can_be_filled_and_run() -> None:
    original = small_clip()
    with torch.device("meta"):
        copy = CLIPModel(original.config)
    copy.to_empty(device="cpu").load_state_dict(original.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.get_image_features(images), original.get_image_features(images))


@torch.no_grad()
def test_a_token_changes_only_what_follows_it() -> None:
    model = CLIPTextModel(text_config(num_hidden_layers=2))
    randomise(model)
    ids = torch.arange(20).view(2, 10)
    changed = ids.clone()
    changed[:, 6] = 99
    before, after = model(ids).last_hidden_state, model(changed).last_hidden_state
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(dim=-1) > 1e-4).all()


@pytest.mark.parametrize(
    ("eos_token_id", "ids", "position"),
    [
        (7, [9, 3, 7, 7, 7], 2),  # padded with the end-of-text token: the first one counts
        (7, [9, 3, 7, 0, 0], 2),
        (7, [3, 3, 3, 3, 3], 0),  # no end: the first token, as in transformers
        (2, [3, 2, 9, 9, 0], 2),  # legacy files: the first largest id, wherever id 2 is
    ],
)
def test_features_are_pooled_at_the_end_of_text(eos_token_id: int, ids: list[int], position: int) -> None:
    model = CLIPTextModel(text_config(eos_token_id=eos_token_id))
    output = model(torch.tensor([ids]))
    assert torch.equal(output.pooled, output.last_hidden_state[:, position])


def test_hidden_states_are_returned_when_asked_for() -> None:
    model = CLIPTextModel(text_config(num_hidden_layers=3))
    ids = torch.tensor([[1, 2, 3]])
    assert model(ids).hidden_states == ()
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    normed = model.text_model.final_layer_norm(output.hidden_states[-1])
    assert torch.equal(normed, output.last_hidden_state)


def test_too_many_tokens_and_a_wrong_image_size_are_refused() -> None:
    with pytest.raises(ValueError, match="78 tokens, more than max_position_embeddings=77"):
        CLIPTextModel(text_config())(torch.zeros(1, 78, dtype=torch.long))
    with pytest.raises(ValueError, match=r"image of \(32, 40\) px, expected image_size=32"):
        CLIPVisionModel(vision_config())(torch.zeros(1, 3, 32, 40))


def test_quick_gelu_is_its_definition() -> None:
    mlp = CLIPMLP(6, 10, "quick_gelu").double()
    x = 20 * torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = mlp.fc1(x)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.silu(1.702 * hidden) / 1.702))


def test_the_logit_scale_starts_at_its_value_and_is_clamped_at_100() -> None:
    model = small_clip()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-4)
    assert model.clamped_logit_scale.item() == pytest.approx(14.285, abs=0.01)
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    assert model.clamped_logit_scale.item() == pytest.approx(100.0)


def test_the_residual_stream_does_not_grow_with_depth_at_initialisation() -> None:
    torch.manual_seed(0)
    model = CLIPVisionModel(vision_config(num_hidden_layers=24))
    states = model(torch.randn(4, 3, 32, 32), output_hidden_states=True).hidden_states
    assert states[-1].std() < 2 * states[0].std()


def test_gradient_checkpointing_leaves_gradients_as_they_are() -> None:
    model = small_clip()
    ids, images = torch.arange(10).view(2, 5), torch.randn(2, 3, 32, 32)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        text, image, scale = model(ids, images)
        (scale * (text * image).sum()).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    assert len(expected) == len(list(model.parameters()))
    model.enable_gradient_checkpointing()
    for actual, gradient in zip(gradients(), expected, strict=True):
        assert torch.equal(actual, gradient)


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_one_another_and_channels_last_changes_nothing() -> None:
    model = small_clip()
    ids, images = torch.arange(15).view(3, 5), torch.randn(3, 3, 32, 32)
    text, image, _ = model(ids, images)
    for i in range(3):
        torch.testing.assert_close(model.get_text_features(ids[i : i + 1]), text[i : i + 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.get_image_features(images[i : i + 1]), image[i : i + 1], atol=1e-5, rtol=0)
    model.to(memory_format=torch.channels_last)
    actual = model.get_image_features(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, image, atol=1e-5, rtol=0)
