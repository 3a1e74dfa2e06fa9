"""Configurations of the models in a single file, which holds none: counted and measured from names and shapes.

What shapes cannot tell (heads, groups, activations, scale of the latents) is as in the published models.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a model's tensors, by their names in the file without the model's prefix."""

HEAD_WIDTH = 64
"""Of the published models: U-Nets since Stable Diffusion 2, transformers, both towers of CLIP."""
_HEADS_OF_STABLE_DIFFUSION_1 = 8
_SIZE_IDS = 6
# Text towers of OpenAI's CLIP have this width at most; the wider ones are of open_clip, with the exact GELU.
_WIDEST_OF_OPENAI = 768
# Stable Diffusion 2 takes the states before the last of OpenCLIP H's layers, which its files hold all the same.
_LAYERS_IN_USE = {24: 23}


def unet_config(shapes: Shapes, pooled_width: int = 1280) -> dict[str, Any]:
    """config.json of a U-Net with the names of latent diffusion.

    Args:
        shapes: of its tensors.
        pooled_width: of the pooled text that is added to the time embedding, where the U-Net takes one.

    Raises:
        KeyError: a tensor that each such U-Net has is missing.
    """
    channels, layers, depths, attended = _levels(shapes)
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    heads = [max(1, width // HEAD_WIDTH) for width in channels]
    added = shapes.get("label_emb.0.0.weight")
    width = added and (added[1] - pooled_width) // _SIZE_IDS
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": _one_or_all(layers),
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attended)],
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": _one_or_all(depths),
        "attention_head_dim": _one_or_all(heads) if linear else _HEADS_OF_STABLE_DIFFUSION_1,
        "use_linear_projection": linear,
        "addition_embed_type": "text_time" if added else None,
        "addition_time_embed_dim": width,
        "projection_class_embeddings_input_dim": added and added[1],
    }


def _levels(shapes: Shapes) -> tuple[list[int], list[int], list[int], list[bool]]:
    """For each level its channels, its layers, the depth of its Transformers, and whether it has any."""
    channels, layers, depths, attended = [0], [0], [1], [False]
    for number in count(1):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in shapes:
            channels, layers, depths, attended = [*channels, 0], [*layers, 0], [*depths, 1], [*attended, False]
        elif f"{block}.0.in_layers.2.weight" in shapes:
            channels[-1] = shapes[f"{block}.0.in_layers.2.weight"][0]
            layers[-1] += 1
            if f"{block}.1.norm.weight" in shapes:
                depths[-1], attended[-1] = num_blocks(shapes, f"{block}.1.transformer_blocks"), True
        else:
            break
    # The middle has the depth of the innermost level, also where that level itself has no attention.
    depths[-1] = num_blocks(shapes, "middle_block.1.transformer_blocks")
    return channels, layers, depths, attended


def vae_config(shapes: Shapes, scaling_factor: float, shift_factor: float | None = None) -> dict[str, Any]:
    """config.json of an autoencoder with the names of latent diffusion; KeyError as in `unet_config`."""
    levels = num_blocks(shapes, "encoder.down")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": num_blocks(shapes, "encoder.down.0.block"),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }


def transformers_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of a text tower with the names of transformers; KeyError as in `unet_config`."""
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    vocab_size, width = shapes["embeddings.token_embedding.weight"]
    positions = shapes["embeddings.position_embedding.weight"][0]
    inner = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    activation = "quick_gelu" if width <= _WIDEST_OF_OPENAI else "gelu"
    config = _text_config((vocab_size, positions), width, inner, num_blocks(shapes, "encoder.layers"), activation)
    return config | _projection(shapes["text_projection.weight"][0]) if "text_projection.weight" in shapes else config


def text_config(shapes: Shapes, activation: str = "gelu", *, is_projected: bool = True) -> dict[str, Any]:
    """config.json of a text tower with OpenAI's names; KeyError as in `unet_config`.

    Args:
        shapes: of its tensors.
        activation: `gelu` or `quick_gelu`.
        is_projected: whether the pooled feature is used, if there is one; else only the states before the last layer.
    """
    vocab_size, width = shapes["token_embedding.weight"]
    layers = num_blocks(shapes, "transformer.resblocks")
    inner = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
    vocabulary = vocab_size, shapes["positional_embedding"][0]
    if not is_projected or "text_projection" not in shapes:
        return _text_config(vocabulary, width, inner, _LAYERS_IN_USE.get(layers, layers), activation)
    config = _text_config(vocabulary, width, inner, layers, activation)
    return config | _projection(shapes["text_projection"][1])


def clip_config(shapes: Shapes, activation: str) -> dict[str, Any]:
    """config.json of a whole CLIP with OpenAI's names and a Vision Transformer; KeyError as in `unet_config`."""
    text = text_config(shapes, activation)
    width, channels, patch, _ = shapes["visual.conv1.weight"]
    grid = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": num_blocks(shapes, "visual.transformer.resblocks"),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "num_channels": channels,
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_act": activation,
        "projection_dim": text["projection_dim"],
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": text["projection_dim"],
        "text_config": text,
        "vision_config": vision,
    }


def _text_config(vocabulary: tuple[int, int], width: int, inner: int, layers: int, activation: str) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary[0],
        "max_position_embeddings": vocabulary[1],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "hidden_act": activation,
        "projection_dim": width,
        # The pooled feature is that of the largest id, whatever the vocabulary.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _projection(width: int) -> dict[str, Any]:
    return {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": width}


def num_blocks(shapes: Shapes, path: str) -> int:
    """The number of modules below a path, which are numbered."""
    return len({name[len(path) + 1 :].partition(".")[0] for name in shapes if name.startswith(f"{path}.")})


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
