"""Stable Diffusion 3 in a single file: names and configurations of its transformer and of T5.

The names are those of the reference implementation (Esser et al. 2024, arXiv:2403.03206). It computes shift and scale
of the last modulations in the other order than diffusers: their halves change places (`swapped`).
"""

from __future__ import annotations

from typing import Any

from ldm_cli.formats.single_file_configs import HEAD_WIDTH, Shapes, num_blocks
from ldm_cli.formats.single_file_names import THIRDS, Content, Place

_ENDS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_QUERY_KEY_VALUE = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
T5_TABLE = {name: Place(name) for name in ("shared", "encoder")}
"""T5, whose names are those of transformers in the file, too."""
_SIDE_OF_LATENTS = 128


def transformer_table(config: Content) -> dict[str, Place]:
    """The transformer: a file has one tensor for queries, keys and values."""
    table = {ours: Place(theirs) for ours, theirs in _ENDS.items()}
    table["norm_out.linear"] = Place("final_layer.adaLN_modulation.1", "swapped")
    last = config["num_layers"] - 1
    for i in range(last + 1):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        table |= {f"{ours}.{a}": Place(f"{theirs}.{b}") for a, b in _BLOCK.items()}
        of_text = f"{theirs}.context_block.adaLN_modulation.1"
        table[f"{ours}.norm1_context.linear"] = Place(of_text, "swapped" if i == last else "same")
        for path, projections in _QUERY_KEY_VALUE.items():
            for name, third in zip(projections, THIRDS, strict=True):
                for kind in ("weight", "bias"):
                    table[f"{ours}.{name}.{kind}"] = Place(f"{theirs}.{path}.{kind}", third)
    return table


def transformer_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of a transformer; without norms of queries, which show it, a head is as wide as those published.

    Raises:
        KeyError: a tensor that each such transformer has is missing.
    """
    width, channels, side, _ = shapes["x_embedder.proj.weight"]
    layers = num_blocks(shapes, "joint_blocks")
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    heads = max(1, width // (HEAD_WIDTH if norm is None else norm[0]))
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": _SIDE_OF_LATENTS,
        "patch_size": side,
        "in_channels": channels,
        "num_layers": layers,
        "attention_head_dim": width // heads,
        "num_attention_heads": heads,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "out_channels": shapes["final_layer.linear.weight"][0] // side**2,
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "dual_attention_layers": [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes],
        "qk_norm": None if norm is None else "rms_norm",
    }


def t5_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of T5's encoder; KeyError as in `transformer_config`."""
    first = "encoder.block.0.layer"
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": shapes["shared.weight"][0],
        "d_model": shapes["shared.weight"][1],
        "d_kv": shapes[f"{first}.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes[f"{first}.1.DenseReluDense.wo.weight"][1],
        "num_layers": num_blocks(shapes, "encoder.block"),
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": buckets,
        "is_encoder_decoder": False,
    }
