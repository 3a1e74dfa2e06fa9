"""Patches that training leaves out, and patches that are compared with an image tower's."""

from __future__ import annotations

import pytest
import torch

from ldm_cli import philox
from ldm_cli.core.condition import Condition
from ldm_cli.core.models.clip_config import CLIPVisionConfig
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_vision import CLIPVisionTransformer
from ldm_cli.core.models.sd3_transformer_2d import SD3Transformer2DModel
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.patch_training import PatchAlignment, PatchSubset, random_subset
from tests.sampling.tiny import randomize

KEY = philox.key(0, "patches")
FIELDS = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 1,
    "caption_projection_dim": 8,
    "joint_attention_dim": 5,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 6,
}


def chosen(count: int, num_patches: int, left_out: float) -> PatchSubset:
    return random_subset(KEY, torch.zeros(count, dtype=torch.int64), torch.arange(count), num_patches, left_out, 1)


def model_and_inputs() -> tuple[SD3Transformer2DModel, tuple[torch.Tensor, torch.Tensor, Condition]]:
    generator = torch.Generator().manual_seed(0)
    x, tokens, pooled = (torch.randn(size, generator=generator) for size in ((2, 3, 8, 8), (2, 4, 5), (2, 6)))
    model = randomize(SD3Transformer2DModel(SD3Transformer2DConfig.from_mapping(FIELDS)), 3)
    return model, (x, torch.tensor([100.0, 900.0]), Condition(tokens=tokens, pooled=pooled))


def test_each_patch_is_seen_equally_often_and_no_sample_sees_one_twice() -> None:
    indices = chosen(4000, 16, 0.75).indices
    assert indices.shape == (4000, 4)
    assert bool((indices.diff(dim=1) > 0).all())
    shares = torch.bincount(indices.flatten(), minlength=16) / 4000
    assert bool(((shares - 0.25).abs() < 0.03).all())
    assert chosen(1, 3, 0.999).indices.shape == (1, 1)


def test_the_weights_of_the_loss_have_mean_one_and_lie_on_the_seen_patches() -> None:
    subset = chosen(5, 12, 0.75)
    weights = subset.weights(3, 4, 2)
    assert weights.shape == (5, 1, 6, 8)
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3)), torch.ones(5))
    patches = weights[:, 0, ::2, ::2].flatten(1)
    assert torch.equal(patches.nonzero()[:, 1].view(5, 3), subset.indices)


def test_to_see_all_patches_is_to_leave_none_out() -> None:
    model, inputs = model_and_inputs()
    every = PatchSubset(torch.arange(16).expand(2, -1), 1)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs, every), model(*inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mixer_blocks", [0, 2])
def test_patches_that_are_left_out_act_through_the_mixer_alone(mixer_blocks: int) -> None:
    model, (x, t, condition) = model_and_inputs()
    subset = PatchSubset(torch.tensor([[0, 5], [3, 9]]), mixer_blocks)
    others = x.clone()
    others[:, :, 6:, 6:] += 1.0  # the last patch, which none sees
    with torch.no_grad():
        found, changed = model(x, t, condition, subset), model(others, t, condition, subset)
    seen = subset.weights(4, 4, 2) > 0
    assert not (found * ~seen).any()
    assert torch.equal(found, changed) == (mixer_blocks == 0)


def test_tokens_that_are_projected_onto_the_features_have_no_loss() -> None:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    tower = randomize(CLIPVisionTransformer(config), 1)
    alignment = PatchAlignment(tower, CLIPImageProcessor.for_side(8), 4)
    assert all(name.startswith("net.") for name in alignment.state_dict())
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        pixels = CLIPImageProcessor.for_side(8)(images)
        features = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        alignment.net = torch.nn.Identity()
        assert alignment(7 * features, images, 4).item() == pytest.approx(0.0, abs=1e-5)
        assert alignment(-features, images, 4).item() == pytest.approx(2.0, abs=1e-5)
        swapped = features.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
        assert alignment(swapped, images, 4).item() > 0.1
