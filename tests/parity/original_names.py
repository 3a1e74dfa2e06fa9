"""Single files as CompVis, Stability AI and OpenAI name their tensors, written by rules of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
_ENDS = (
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"^conv_in", lambda m: "input_blocks.0.0"),
    (r"^conv_norm_out", lambda m: "out.0"),
    (r"^conv_out", lambda m: "out.2"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", lambda m: "middle_block.1"),
)


def unet(state: Mapping[str, Tensor], layers: int, attended_up: list[bool]) -> dict[str, Tensor]:
    """A U-Net of `layers` per level; `attended_up` for each level of the way up."""
    step = layers + 1
    ways = (
        (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"input_blocks.{step * i + j + 1}.0"),
        (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda i, j: f"input_blocks.{step * i + j + 1}.1"),
        (r"^down_blocks\.(\d)\.downsamplers\.(\d)\.conv", lambda i, j: f"input_blocks.{step * (i + 1)}.0.op"),
        (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"output_blocks.{step * i + j}.0"),
        (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda i, j: f"output_blocks.{step * i + j}.1"),
        (
            r"^up_blocks\.(\d)\.upsamplers\.(\d)",
            lambda i, j: f"output_blocks.{step * i + layers}.{2 if attended_up[i] else 1}",
        ),
    )
    renamed = {}
    for name, tensor in state.items():
        if ".resnets." in name:
            for ours, theirs in _RESNET:
                name = name.replace(f".{ours}.", f".{theirs}.")
        for pattern, replacement in _ENDS:
            name = re.sub(pattern, replacement, name)
        for pattern, place in ways:
            name = re.sub(pattern, lambda m, place=place: place(int(m[1]), int(m[2])), name)
        renamed[name] = tensor
    return renamed


def vae(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """An autoencoder."""
    renamed = {}
    for name, tensor in state.items():
        attention = ".attentions." in name
        for ours, theirs in (("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_", ""), ("attentions.0", "attn_1")):
            name = name.replace(ours, theirs) if attention else name
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = (
            name.replace("mid_block", "mid")
            .replace("conv_norm_out", "norm_out")
            .replace("conv_shortcut", "nin_shortcut")
        )
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        renamed[name] = tensor[..., None, None] if attention and tensor.ndim == 2 else tensor
    return renamed


def sd3_transformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer of Stable Diffusion 3 under the names of the reference implementation."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    words = (
        ("pos_embed.pos_embed", "pos_embed"),
        ("pos_embed.proj", "x_embedder.proj"),
        ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        ("proj_out", "final_layer.linear"),
        ("norm1_context.linear", "context_block.adaLN_modulation.1"),
        ("norm1.linear", "x_block.adaLN_modulation.1"),
        ("ff_context.net.0.proj", "context_block.mlp.fc1"),
        ("ff_context.net.2", "context_block.mlp.fc2"),
        ("ff.net.0.proj", "x_block.mlp.fc1"),
        ("ff.net.2", "x_block.mlp.fc2"),
        ("attn.to_add_out", "context_block.attn.proj"),
        ("attn.norm_added_", "context_block.attn.ln_"),
        ("transformer_blocks", "joint_blocks"),
    )
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        is_swapped = name.startswith((f"transformer_blocks.{last}.norm1_context", "norm_out"))
        for ours, theirs in words:
            name = name.replace(ours, theirs)
        name = re.sub(r"\d\.attn(2?)\.to_out\.0", lambda m: f"{m[0][0]}.x_block.attn{m[1]}.proj", name)
        name = re.sub(r"\d\.attn(2?)\.norm_", lambda m: f"{m[0][0]}.x_block.attn{m[1]}.ln_", name)
        if is_swapped:
            shift, scale = tensor.chunk(2)
            tensor = torch.cat([scale, shift])
        renamed[name] = tensor
    for name in list(renamed):
        if match := re.fullmatch(r"(joint_blocks\.\d)\.(attn2?)\.(to_q|add_q_proj)\.(\w+)", name):
            block, attention, query, kind = match.groups()
            three = [f"{block}.{attention}.{query.replace('q', letter)}.{kind}" for letter in "qkv"]
            side = "x_block" if query == "to_q" else "context_block"
            renamed[f"{block}.{side}.{attention}.qkv.{kind}"] = torch.cat([renamed.pop(one) for one in three])
    return renamed


def write_sd3(pipeline: Any, file: Path, *, has_encoders: bool = True) -> Path:
    """A Stable Diffusion 3 pipeline of diffusers as one file; returns that."""
    tensors = prefixed("model.diffusion_model.", sd3_transformer(pipeline.transformer.state_dict()))
    levels = len(pipeline.vae.config.block_out_channels)
    tensors |= prefixed("first_stage_model.", vae(pipeline.vae.state_dict(), levels))
    encoders = {"clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2, "t5xxl": pipeline.text_encoder_3}
    for name, model in encoders.items():
        if has_encoders and model is not None:
            tensors |= prefixed(f"text_encoders.{name}.transformer.", model.state_dict())
    save_file({name: tensor.clone() for name, tensor in tensors.items() if "position_ids" not in name}, file)
    return file


def open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower, or a whole CLIP."""
    words = (
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("text_model.embeddings.token_embedding", "token_embedding"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm", "ln_final"),
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.patch_embedding", "visual.conv1"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("self_attn.", "attn."),
    )
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for ours, theirs in words:
            name = name.replace(ours, theirs)
        if name in ("text_projection.weight", "visual_projection.weight"):
            name, tensor = ("text_projection" if name[0] == "t" else "visual.proj"), tensor.T.contiguous()
        renamed[name] = tensor
    for name in [name for name in renamed if ".q_proj." in name]:
        thirds = [renamed.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        renamed[name.replace(".q_proj.", ".in_proj_")] = torch.cat(thirds)
    return renamed


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with a prefix."""
    return {prefix + name: tensor for name, tensor in state.items()}


def of_tower(tower: Any) -> dict[str, Tensor]:
    """A text tower's tensors under the names of transformers 4, which transformers 5 shortens."""
    state = tower.state_dict()
    return {n if n.startswith("text_") else f"text_model.{n}": t for n, t in state.items() if "position_ids" not in n}


def write(pipeline: Any, file: Path, dtype: torch.dtype = torch.float32, **extra: Tensor) -> Path:
    """A pipeline of diffusers as one file; returns that."""
    config = pipeline.unet.config
    attended = [kind.startswith("Cross") for kind in config.up_block_types]
    tensors = prefixed("model.diffusion_model.", unet(pipeline.unet.state_dict(), config.layers_per_block, attended))
    levels = len(pipeline.vae.config.block_out_channels)
    tensors |= prefixed("first_stage_model.", vae(pipeline.vae.state_dict(), levels))
    first = of_tower(pipeline.text_encoder)
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= prefixed("conditioner.embedders.0.transformer.", first)
        tensors |= prefixed("conditioner.embedders.1.model.", open_clip(of_tower(pipeline.text_encoder_2)))
    elif pipeline.text_encoder.config.hidden_act == "gelu":
        tensors |= prefixed("cond_stage_model.model.", open_clip(first))
    else:
        tensors |= prefixed("cond_stage_model.transformer.", first)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in (tensors | extra).items()}, file)
    return file
