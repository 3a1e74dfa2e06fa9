"""The names that single files have for the tensors of model folders: tables, used in both directions.

A table holds each module or tensor whose path differs. What lies below an entry keeps its name: `norm1.weight` follows
`norm1`. The names are those of CompVis' latent diffusion (arXiv:2112.10752) and of OpenAI's CLIP (arXiv:2103.00020),
which open_clip shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Form = Literal["same", "convolution", "transposed", "swapped", "query", "key", "value"]
THIRDS: tuple[Form, ...] = ("query", "key", "value")


@dataclass(frozen=True)
class Place:
    """Where a single file holds a module or a tensor.

    Attributes:
        path: in the file, without the prefix of the model.
        form: `convolution`: a linear layer's weight [O, I] is [O, I, 1, 1] there. `transposed`: [I, O]. `swapped`: the
            second half of the rows comes first. `query`, `key`, `value`: a third of the rows of one tensor that holds
            all three.
    """

    path: str
    form: Form = "same"


Table = Mapping[str, Place]
Content = Mapping[str, Any]
"""A complete config.json."""

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_table(config: Content) -> dict[str, Place]:
    """The U-Net: a file numbers its blocks from the input to the middle, and on to the output."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    layers = [layers] * levels if isinstance(layers, int) else layers
    table = {ours: Place(theirs) for ours, theirs in _UNET.items()}
    for i in range(2):
        table |= _unet_resnet(f"mid_block.resnets.{i}", f"middle_block.{2 * i}")
    number = 1
    for level, kind in enumerate(config["down_block_types"]):
        block = f"down_blocks.{level}"
        for layer in range(layers[level]):
            table |= _unet_layer(block, layer, f"input_blocks.{number}", kind)
            number += 1
        if level < levels - 1:
            table[f"{block}.downsamplers.0.conv"] = Place(f"input_blocks.{number}.0.op")
            number += 1
    number = 0
    for level, kind in enumerate(config["up_block_types"]):
        block = f"up_blocks.{level}"
        for layer in range(layers[levels - 1 - level] + 1):
            table |= _unet_layer(block, layer, f"output_blocks.{number}", kind)
            number += 1
        if level < levels - 1:
            position = 2 if kind == "CrossAttnUpBlock2D" else 1
            table[f"{block}.upsamplers.0.conv"] = Place(f"output_blocks.{number - 1}.{position}.conv")
    return table


def _unet_layer(block: str, layer: int, theirs: str, kind: str) -> dict[str, Place]:
    table = _unet_resnet(f"{block}.resnets.{layer}", f"{theirs}.0")
    if kind.startswith("CrossAttn"):
        table[f"{block}.attentions.{layer}"] = Place(f"{theirs}.1")
    return table


def _unet_resnet(ours: str, theirs: str) -> dict[str, Place]:
    return {f"{ours}.{a}": Place(f"{theirs}.{b}") for a, b in _UNET_RESNET.items()}


def vae_table(config: Content) -> dict[str, Place]:
    """The autoencoder: a file numbers the decoder's levels from the image inwards."""
    levels = len(config["block_out_channels"])
    table = {name: Place(name) for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        table |= {f"{side}.{name}": Place(f"{side}.{name}") for name in ("conv_in", "conv_out")}
        table[f"{side}.conv_norm_out"] = Place(f"{side}.norm_out")
        for i in range(2):
            table |= _vae_resnet(f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}")
        for ours, theirs in _VAE_ATTENTION.items():
            form: Form = "same" if ours == "group_norm" else "convolution"
            table[f"{side}.mid_block.attentions.0.{ours}"] = Place(f"{side}.mid.attn_1.{theirs}", form)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        file_up = f"decoder.up.{levels - 1 - level}"
        table[f"{down}.downsamplers.0"] = Place(f"encoder.down.{level}.downsample")
        table[f"{up}.upsamplers.0"] = Place(f"{file_up}.upsample")
        for layer in range(config["layers_per_block"] + 1):
            table |= _vae_resnet(f"{down}.resnets.{layer}", f"encoder.down.{level}.block.{layer}")
            table |= _vae_resnet(f"{up}.resnets.{layer}", f"{file_up}.block.{layer}")
    return table


def _vae_resnet(ours: str, theirs: str) -> dict[str, Place]:
    return {ours: Place(theirs), f"{ours}.conv_shortcut": Place(f"{theirs}.nin_shortcut")}


TRANSFORMERS_TABLE = {name: Place(name) for name in ("text_model", "text_projection")}
"""A text tower whose names are those of transformers in the file, too."""


def text_table(config: Content) -> dict[str, Place]:
    """A text tower with OpenAI's names."""
    return {
        "text_model.embeddings.token_embedding": Place("token_embedding"),
        "text_model.embeddings.position_embedding.weight": Place("positional_embedding"),
        "text_model.final_layer_norm": Place("ln_final"),
        "text_projection.weight": Place("text_projection", "transposed"),
        **_clip_layers("text_model", "transformer", config["num_hidden_layers"]),
    }


def clip_table(config: Content) -> dict[str, Place]:
    """A whole CLIP with OpenAI's names, its image tower a Vision Transformer."""
    table = text_table(config["text_config"]) | {
        "logit_scale": Place("logit_scale"),
        "vision_model.embeddings.class_embedding": Place("visual.class_embedding"),
        "vision_model.embeddings.patch_embedding": Place("visual.conv1"),
        "vision_model.embeddings.position_embedding.weight": Place("visual.positional_embedding"),
        "vision_model.pre_layrnorm": Place("visual.ln_pre"),
        "vision_model.post_layernorm": Place("visual.ln_post"),
        "visual_projection.weight": Place("visual.proj", "transposed"),
    }
    return table | _clip_layers(
        "vision_model", "visual.transformer", config["vision_config"].get("num_hidden_layers", 0)
    )


def _clip_layers(ours: str, theirs: str, num_layers: int) -> dict[str, Place]:
    table: dict[str, Place] = {}
    for i in range(num_layers):
        layer, block = f"{ours}.encoder.layers.{i}", f"{theirs}.resblocks.{i}"
        table |= {f"{layer}.{a}": Place(f"{block}.{b}") for a, b in _CLIP_LAYER.items()}
        for letter, third in zip("qkv", THIRDS, strict=True):
            for kind in ("weight", "bias"):
                table[f"{layer}.self_attn.{letter}_proj.{kind}"] = Place(f"{block}.attn.in_proj_{kind}", third)
    return table


def place_of(name: str, table: Table) -> Place | None:
    """Where a single file holds a tensor of a model folder; None: single files have no name for it."""
    path = next((p for p in _ancestors(name) if p in table), None)
    return None if path is None else replace(table[path], path=table[path].path + name[len(path) :])


def from_file(tensors: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The tensors of a single file under the names of a model folder, as views; unknown names stay as they are."""
    entries: dict[str, list[tuple[str, Form]]] = {}
    for ours, place in table.items():
        entries.setdefault(place.path, []).append((ours, place.form))
    renamed = {}
    for name, tensor in tensors.items():
        path = next((p for p in _ancestors(name) if p in entries), name)
        for ours, form in entries.get(path, [(name, "same")]):
            renamed[ours + name[len(path) :]] = _unfold(tensor, form)
    return renamed


def to_file(tensors: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The tensors of a model folder under the names of a single file: the inverse of `from_file`.

    Raises:
        ValueError: single files have no name for some tensors; the message is the first of their names.
    """
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[Form, Tensor]] = {}
    for name, tensor in tensors.items():
        place = place_of(name, table)
        if place is None:
            raise ValueError(name)
        if place.form in THIRDS:
            thirds.setdefault(place.path, {})[place.form] = tensor
        else:
            renamed[place.path] = _folded(tensor, place.form)
    return renamed | {name: torch.cat([parts[third] for third in THIRDS]) for name, parts in thirds.items()}


def _folded(tensor: Tensor, form: Form) -> Tensor:
    """The inverse of `_unfold`, of a tensor that is no third."""
    is_linear = form == "convolution" and tensor.ndim == 2
    return tensor[:, :, None, None] if is_linear else _unfold(tensor, "same" if form == "convolution" else form)


def rows_of(tensor: Tensor, form: Form) -> Tensor:
    """The rows of a file's tensor that an entry of this form stands for, in the order of the folder's."""
    if form in THIRDS:
        return tensor.tensor_split(3)[THIRDS.index(form)]
    return torch.cat(tensor.chunk(2)[::-1]) if form == "swapped" else tensor


def _unfold(tensor: Tensor, form: Form) -> Tensor:
    """`rows_of`, in the shape of the folder's tensor."""
    if form == "convolution" and tensor.ndim == 4:
        return tensor.flatten(1)
    return tensor.T if form == "transposed" and tensor.ndim == 2 else rows_of(tensor, form)


def _ancestors(name: str) -> Iterator[str]:
    """The name itself, then the path of each module around it, innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]
