from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ldm_cli.config import Config
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, ModifiedResNetConfig
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig

MINIMAL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
MINIMAL_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "norm_num_groups": 8,
    "sample_size": 16,
}
OLD_TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 37,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "projection_dim": 512,
    "transformers_version": "4.25.1",
    "vocab_size": 600,
    "torch_dtype": "float32",
}


@pytest.mark.parametrize(
    ("config_class", "mapping", "num_keys"),
    [(UNet2DConditionConfig, MINIMAL_UNET, 50), (AutoencoderKLConfig, MINIMAL_VAE, 20)],
)
def test_a_minimal_diffusers_config_is_read_and_written_with_every_key(
    config_class: Any, mapping: dict[str, Any], num_keys: int
) -> None:
    config = config_class.from_hugging_face(mapping)
    written = config.to_hugging_face()
    assert len(written) == num_keys
    assert mapping.items() <= written.items()
    assert config_class.from_hugging_face(written) == config


def test_an_old_text_encoder_config_is_read() -> None:
    config = CLIPTextConfig.from_hugging_face(OLD_TEXT_ENCODER)
    assert (config.vocab_size, config.intermediate_size, config.eos_token_id) == (600, 37, 2)
    written = config.to_hugging_face("bfloat16")
    assert written["architectures"] == ["CLIPTextModel"]
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert CLIPTextConfig.from_hugging_face(written) == config


def test_both_generations_of_clip_config_are_read() -> None:
    text = {**OLD_TEXT_ENCODER, "top_k": 50}
    legacy = {**OLD_TEXT_ENCODER, "hidden_size": 64}
    config = CLIPConfig.from_hugging_face(
        {
            "model_type": "clip",
            "text_config": text,
            "text_config_dict": legacy,
            "vision_config": {"patch_size": 16, "eos_token_id": None},
            "vision_config_dict": None,
            "projection_dim": 64,
            "_commit_hash": None,
        }
    )
    assert (config.text_config.vocab_size, config.text_config.hidden_size) == (600, 64)
    assert config.vision_config == CLIPVisionConfig(patch_size=16)
    assert CLIPConfig.from_hugging_face(config.to_hugging_face()) == config


@pytest.mark.parametrize("found", [5, [1], "x", True])
@pytest.mark.parametrize("name", ["text_config", "vision_config", "text_config_dict"])
def test_a_tower_that_is_no_object_is_named(name: str, found: Any) -> None:
    with pytest.raises(ValueError, match=name.removesuffix("_dict")):
        CLIPConfig.from_hugging_face({name: found})


def test_a_resnet_tower_is_marked_as_ours_and_read_back() -> None:
    config = CLIPConfig(vision_config=ModifiedResNetConfig(width=32))
    written = config.to_hugging_face()
    assert written["model_type"] == "clip_modified_resnet"
    assert written["architectures"] == ["CLIPModelWithModifiedResNet"]
    assert CLIPConfig.from_hugging_face(written) == config


@pytest.mark.parametrize(
    ("config_class", "change", "field"),
    [
        (UNet2DConditionConfig, {"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention"),
        (UNet2DConditionConfig, {"dropout": 0.1}, "dropout"),
        (UNet2DConditionConfig, {"num_attention_heads": 8}, "num_attention_heads"),
        (UNet2DConditionConfig, {"class_embed_type": "simple_projection"}, "class_embed_type"),
        (UNet2DConditionConfig, {"a_new_option": None}, "a_new_option"),
        (AutoencoderKLConfig, {"latents_mean": [0.0, 0.1]}, "latents_mean"),
        (AutoencoderKLConfig, {"act_fn": "relu"}, "act_fn"),
        (CLIPTextConfig, {"hidden_act": "relu"}, "hidden_act"),
        (CLIPTextConfig, {"model_type": "clip_vision_model"}, "model_type"),
        (CLIPVisionConfig, {"quantization_config": {}}, "quantization_config"),
    ],
)
def test_an_option_that_is_not_implemented_is_refused_by_name(
    config_class: Any, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        config_class.from_hugging_face(change)
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_a_config_of_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match="it is of class 'AutoencoderKL', expected 'UNet2DConditionModel'"):
        UNet2DConditionConfig.from_hugging_face(MINIMAL_VAE)
    with pytest.raises(ValueError, match="pruned_heads"):
        CLIPTextConfig.from_hugging_face({**OLD_TEXT_ENCODER, "pruned_heads": {"0": [1]}})


@pytest.mark.parametrize(
    ("config_class", "change", "message"),
    [
        (UNet2DConditionConfig, {"block_out_channels": []}, "at least one level"),
        (UNet2DConditionConfig, {"down_block_types": ["DownBlock2D"] * 2}, "down_block_types has 2 entries.* has 4"),
        (UNet2DConditionConfig, {"attention_head_dim": [8, 8]}, "attention_head_dim has 2 entries.* has 4"),
        (UNet2DConditionConfig, {"norm_num_groups": 24}, "norm_num_groups=24 does not divide 320"),
        (UNet2DConditionConfig, {"attention_head_dim": 7}, r"=7 .* block_out_channels\[0\]=320"),
        (UNet2DConditionConfig, {"block_out_channels": [33] * 4, "norm_num_groups": 3}, "=33 is odd"),
        (UNet2DConditionConfig, {"class_embed_type": "projection"}, "needs projection_class_embeddings_input_dim"),
        (
            UNet2DConditionConfig,
            {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 8},
            "needs addition_time_embed_dim",
        ),
        (AutoencoderKLConfig, {"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types has 2 entries.* has 1"),
        (AutoencoderKLConfig, {"norm_num_groups": 24}, "norm_num_groups=24 does not divide 64"),
        (AutoencoderKLConfig, {"block_out_channels": []}, "at least one level"),
        (CLIPTextConfig, {"num_attention_heads": 7}, "num_attention_heads=7 does not divide hidden_size=512"),
        (CLIPVisionConfig, {"num_attention_heads": 7}, "num_attention_heads=7 does not divide hidden_size=768"),
        (CLIPVisionConfig, {"patch_size": 30}, "patch_size=30 does not divide image_size=224"),
        (ModifiedResNetConfig, {"width": 63}, "width=63 is odd"),
        (ModifiedResNetConfig, {"heads": 7}, r"heads=7 does not divide 32 \* width=2048"),
        (ModifiedResNetConfig, {"image_size": 48}, "image_size=48 is not a multiple of the total stride 32"),
    ],
)
def test_sizes_that_do_not_fit_are_named(config_class: type[Config], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_class.from_mapping(change)


def test_heads_are_checked_only_where_there_is_attention() -> None:
    plain = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "mid_block_type": "UNetMidBlock2D"}
    config = UNet2DConditionConfig.from_mapping({**plain, "block_out_channels": [32], "attention_head_dim": 7})
    assert config.levels_with_text() == []
