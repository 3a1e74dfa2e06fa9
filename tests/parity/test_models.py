"""Our networks against diffusers and transformers: same weights both ways, the same numbers out.

Weights are drawn normal, so that outputs are of order 1 and every layer matters; configurations are drawn by
a seeded generator, so that a failure can be repeated.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from tests.core.models.weights import randomise

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Load ours into theirs and back, strictly, after checking that names and shapes are the same."""
    our_state, their_state = ours.state_dict(), theirs.state_dict()
    assert {k: v.shape for k, v in our_state.items()} == {k: v.shape for k, v in their_state.items()}
    theirs.load_state_dict(our_state, strict=True)
    randomise(theirs, seed=7)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval()
    theirs.eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert 0.05 < theirs.abs().max() < 30
    assert (ours - theirs).abs().max() <= TOLERANCE


def random_unet(choose: random.Random) -> dict[str, Any]:
    groups = choose.choice([2, 4, 8])
    levels = choose.choice([1, 2, 3])
    channels = tuple(groups * 4 * choose.choice([1, 2, 3]) for _ in range(levels))
    down = [choose.choice(["DownBlock2D", "CrossAttnDownBlock2D"]) for _ in range(levels)]
    up = [choose.choice(["UpBlock2D", "CrossAttnUpBlock2D"]) for _ in range(levels)]
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": choose.choice([3, 4, 9]),
        "out_channels": choose.choice([3, 4, 8]),
        "block_out_channels": channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "mid_block_type": choose.choice(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None]),
        "layers_per_block": choose.choice([1, 2, tuple(choose.choice([1, 2]) for _ in range(levels))]),
        "transformer_layers_per_block": choose.choice([1, tuple(choose.choice([1, 2]) for _ in range(levels))]),
        "attention_head_dim": choose.choice([4, tuple(choose.choice([1, 2, 4]) for _ in range(levels))]),
        "cross_attention_dim": 12,
        "norm_num_groups": groups,
        "use_linear_projection": choose.choice([False, True]),
        "flip_sin_to_cos": choose.choice([True, False]),
        "freq_shift": choose.choice([0, 1]),
        "time_embedding_dim": choose.choice([None, 24]),
    }
    conditions: list[dict[str, Any]] = [
        {},
        {"num_class_embeds": 5},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 10 + 6 * 8,
        },
        {"time_cond_proj_dim": 6},
    ]
    return config | choose.choice(conditions)


def unet_conditions(config: UNet2DConditionConfig, batch: int) -> tuple[Condition, dict[str, Any]]:
    """Random conditions for our forward, and the same for diffusers'."""
    ours = {"tokens": torch.randn(batch, 5, 12)}
    theirs: dict[str, Any] = {"encoder_hidden_states": ours["tokens"]}
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        width = config.time_embedding_dim or 4 * config.block_out_channels[0]
        labels = {
            "timestep": torch.tensor([3.0, 700.0])[:batch],
            "identity": torch.randn(batch, width),
            "projection": torch.randn(batch, 6),
            None: torch.arange(batch) + 2,
        }[config.class_embed_type]
        ours["pooled"] = theirs["class_labels"] = labels
    if config.addition_embed_type is not None:
        added = {"text_embeds": torch.randn(batch, 10), "time_ids": torch.rand(batch, 6) * 1024}
        ours["pooled"], theirs["added_cond_kwargs"] = torch.cat([*added.values()], dim=1), added
    if config.time_cond_proj_dim is not None:
        ours["guidance"] = theirs["timestep_cond"] = torch.randn(batch, config.time_cond_proj_dim)
    return Condition(**ours), theirs


@pytest.mark.parametrize("seed", range(16))
def test_unet_equals_diffusers(seed: int) -> None:
    choose = random.Random(seed)
    config = UNet2DConditionConfig(**random_unet(choose))
    torch.manual_seed(seed)
    ours = UNet2DConditionModel(config)
    theirs = diffusers.UNet2DConditionModel.from_config(config.to_hugging_face())
    assert_same_weights(ours, theirs)
    height, width = choose.choice([(8, 8), (9, 7), (12, 6)])  # odd sizes: the way up follows the way down
    sample = torch.randn(2, config.in_channels, height, width)
    timestep = torch.tensor(choose.choice([[17.0], [3.25], [999.0, 0.0], [0.5, 500.25]]))
    condition, theirs_given = unet_conditions(config, batch=2)
    with torch.no_grad():
        actual = ours(sample, timestep, condition)
        expected = theirs(sample, timestep, **theirs_given).sample
    assert_close(actual, expected)


def test_the_drawn_unets_cover_every_option() -> None:
    drawn = [random_unet(random.Random(seed)) for seed in range(16)]
    assert {c["mid_block_type"] for c in drawn} == {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None}
    assert {c["use_linear_projection"] for c in drawn} == {False, True}
    assert {len(c["block_out_channels"]) for c in drawn} == {1, 2, 3}
    assert {c.get("class_embed_type") for c in drawn} == {None, "timestep", "identity", "projection"}
    for name in ("num_class_embeds", "addition_embed_type", "time_cond_proj_dim"):
        assert any(c.get(name) for c in drawn), name
    for name in ("layers_per_block", "attention_head_dim", "transformer_layers_per_block"):
        assert {type(c[name]) for c in drawn} == {int, tuple}, name


@pytest.mark.parametrize("seed", range(8))
def test_autoencoder_equals_diffusers(seed: int) -> None:
    choose = random.Random(seed)
    groups, levels = choose.choice([2, 4]), 1 + seed % 4
    config = AutoencoderKLConfig(
        block_out_channels=tuple(groups * 4 * choose.choice([1, 2]) for _ in range(levels)),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=choose.choice([1, 2]),
        latent_channels=choose.choice([4, 16]),
        norm_num_groups=groups,
        use_quant_conv=seed % 2 == 0,
        use_post_quant_conv=choose.choice([False, True]),
        mid_block_add_attention=choose.choice([False, True]),
    )
    torch.manual_seed(seed)
    ours = AutoencoderKL(config)
    theirs = diffusers.AutoencoderKL.from_config(config.to_hugging_face())
    assert_same_weights(ours, theirs)
    images = torch.randn(2, 3, 3 * ours.factor, 2 * ours.factor)
    with torch.no_grad():
        posterior, expected = ours.posterior(images), theirs.encode(images).latent_dist
        assert_close(posterior.mean, expected.mean)
        assert_close(posterior.logvar, expected.logvar)
        assert_close(posterior.mode(), expected.mode())
        assert torch.allclose(posterior.kl(), expected.kl(), rtol=1e-5)
        assert_close(ours.decode_z(expected.mean), theirs.decode(expected.mean).sample)


def random_text(choose: random.Random, **fixed: Any) -> CLIPTextConfig:
    heads = choose.choice([1, 2, 4])
    return CLIPTextConfig(
        vocab_size=60,
        hidden_size=heads * choose.choice([4, 8]),
        intermediate_size=choose.choice([16, 37]),
        num_hidden_layers=choose.choice([1, 2, 3]),
        num_attention_heads=heads,
        max_position_embeddings=12,
        hidden_act=choose.choice(["quick_gelu", "gelu"]),
        projection_dim=choose.choice([8, 20]),
        **fixed,
    )


PADDINGS = {
    "end of text": [[58, 5, 7, 59, 59, 59, 59, 59], [58, 1, 2, 3, 4, 5, 6, 59]],
    "zero": [[58, 5, 7, 59, 0, 0, 0, 0], [58, 59, 0, 0, 0, 0, 0, 0]],
    "none": [[58, 5, 59], [58, 9, 59]],
    "two ends": [[58, 5, 59, 7, 59], [58, 59, 59, 7, 8]],
    "no end": [[58, 5, 6], [1, 1, 2]],
}


def with_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 leaves `text_model.` out of a bare text tower; 4 may add a buffer of positions."""
    bare = ("embeddings.", "encoder.", "final_layer_norm.")
    named = {f"text_model.{k}" if k.startswith(bare) else k: v for k, v in state.items()}
    return {k: v for k, v in named.items() if not k.endswith("position_ids")}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("eos_token_id", [2, 59])
def test_text_tower_equals_transformers(eos_token_id: int, padding: str) -> None:
    config = random_text(
        random.Random(f"{eos_token_id} {padding}"), eos_token_id=eos_token_id, bos_token_id=58, pad_token_id=0
    )
    ours = CLIPTextModel(config)
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config.to_hugging_face())).eval()
    randomise(theirs, seed=3)
    ours.load_state_dict(with_prefix(theirs.state_dict()), strict=True)
    ids = torch.tensor(PADDINGS[padding])
    with torch.no_grad():
        actual, expected = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
    assert_close(actual.last_hidden_state, expected.last_hidden_state)
    assert_close(actual.pooled, expected.pooler_output)
    assert len(actual.hidden_states) == len(expected.hidden_states) == config.num_hidden_layers + 1
    # transformers 5 puts the normed state last in this list, 4 the raw one; all others are the same.
    for mine, other in zip(actual.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
        assert_close(mine, other)


def test_text_tower_with_projection_equals_transformers() -> None:
    config = random_text(random.Random(5), eos_token_id=59, bos_token_id=58)
    ours = CLIPTextModelWithProjection(config)
    their_config = transformers.CLIPTextConfig(**config.to_hugging_face())
    theirs = transformers.CLIPTextModelWithProjection(their_config).eval()
    assert_same_weights(ours, theirs)
    ids = torch.tensor(PADDINGS["zero"])
    with torch.no_grad():
        assert_close(ours.project(ours(ids)), theirs(ids).text_embeds)


@pytest.mark.parametrize("seed", range(4))
def test_clip_equals_transformers(seed: int) -> None:
    choose = random.Random(seed)
    heads, patch = choose.choice([1, 2, 4]), choose.choice([4, 8])
    mapping = CLIPConfig(projection_dim=choose.choice([8, 20])).to_mapping()
    mapping["text_config"] = random_text(choose, eos_token_id=59, bos_token_id=58).to_mapping()
    mapping["vision_config"] |= {
        "hidden_size": heads * choose.choice([4, 8]),
        "intermediate_size": choose.choice([16, 37]),
        "num_hidden_layers": choose.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "image_size": patch * choose.choice([1, 2, 3]),
        "patch_size": patch,
        "hidden_act": choose.choice(["quick_gelu", "gelu"]),
    }
    config = CLIPConfig.from_mapping(mapping)
    ours = CLIPModel(config)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**config.to_hugging_face()))
    assert_same_weights(ours, theirs)
    torch.manual_seed(seed)
    size = mapping["vision_config"]["image_size"]
    ids, pixels = torch.tensor(PADDINGS["zero"]), torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels)
        text, image, scale = ours(ids, pixels)
        assert_close(nn.functional.normalize(text, dim=-1), expected.text_embeds)
        assert_close(nn.functional.normalize(image, dim=-1), expected.image_embeds)
        assert_close(text, ours.get_text_features(ids))
        states = ours.vision_model(pixels, output_hidden_states=True).hidden_states
        assert_close(states[-1], expected.vision_model_output.last_hidden_state)
    assert torch.allclose(scale, theirs.logit_scale.exp())


def test_configs_that_the_libraries_write_are_read() -> None:
    unet = diffusers.UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=8, norm_num_groups=8)
    config = UNet2DConditionConfig.from_hugging_face(dict(unet.config))
    assert {k: v for k, v in config.to_hugging_face().items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in dict(unet.config).items() if k[0] != "_"
    }
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    assert AutoencoderKLConfig.from_hugging_face(dict(vae.config)).block_out_channels == (32,)
    clip = transformers.CLIPConfig()
    assert CLIPConfig.from_hugging_face(clip.to_dict()) == CLIPConfig()
    assert CLIPTextConfig.from_hugging_face(clip.text_config.to_dict()) == CLIPTextConfig()
