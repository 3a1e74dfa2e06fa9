"""What single files hold, as data: kinds of models, how each is recognised, and under which prefix it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ldm_cli.formats import single_file_names as names
from ldm_cli.formats import single_file_sd3 as sd3
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3, TRANSFORMER, UNET, VAE


@dataclass(frozen=True)
class Kind:
    """A kind of model in single files.

    Attributes:
        marks: names that each such model has, and together no other kind.
        table: the table of names of a configuration.
        unused: beginnings of names that its files may hold and the model never reads.
        repeated: tensors that are written under a second name, by that name.
    """

    marks: tuple[str, ...]
    table: Callable[[names.Content], names.Table]
    unused: tuple[str, ...] = ()
    repeated: Mapping[str, str] = field(default_factory=dict)


_OPENAI_MARKS = ("token_embedding.weight", "transformer.resblocks.0.attn.in_proj_weight")
KINDS: Mapping[str, Kind] = {
    "unet": Kind(("input_blocks.0.0.weight", "middle_block.1.proj_in.weight", "out.2.weight"), names.unet_table),
    "vae": Kind(
        ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"),
        names.vae_table,
        ("loss.", "model_ema."),
    ),
    "transformer": Kind(
        ("x_embedder.proj.weight", "joint_blocks.0.x_block.attn.qkv.weight", "final_layer.linear.weight"),
        sd3.transformer_table,
    ),
    "t5": Kind(
        ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        lambda _: sd3.T5_TABLE,
        ("encoder.embed_tokens.", "logit_scale"),
        {"encoder.embed_tokens.weight": "shared.weight"},
    ),
    "transformers text": Kind(
        ("text_model.embeddings.token_embedding.weight",), lambda _: names.TRANSFORMERS_TABLE, ("logit_scale",)
    ),
    # Without the prefix, as versions of transformers before the first release of Stable Diffusion wrote it.
    "old transformers text": Kind(("embeddings.token_embedding.weight",), lambda _: {}),
    "clip": Kind(
        ("visual.conv1.weight", *_OPENAI_MARKS, "visual.proj"),
        names.clip_table,
        ("attn_mask", "input_resolution", "context_length", "vocab_size"),
    ),
    "openai text": Kind(_OPENAI_MARKS, names.text_table, ("attn_mask", "logit_scale")),
}
UNPROJECTED = "text_encoders.clip_l.transformer."
"""Prefix of the tower whose pooled text Stable Diffusion 3 takes as it is, whatever projection its file holds."""
PLACES = (
    (TRANSFORMER, "model.diffusion_model.", "transformer"),
    (UNET, "model.diffusion_model.", "unet"),
    (VAE, "first_stage_model.", "vae"),
    (VAE, "vae.", "vae"),
    (TEXT_ENCODER, "cond_stage_model.transformer.", "transformers text"),
    (TEXT_ENCODER, "cond_stage_model.transformer.", "old transformers text"),
    (TEXT_ENCODER, "cond_stage_model.model.", "openai text"),
    (TEXT_ENCODER, "conditioner.embedders.0.transformer.", "transformers text"),
    (TEXT_ENCODER_2, "conditioner.embedders.1.model.", "openai text"),
    (TEXT_ENCODER, UNPROJECTED, "transformers text"),
    (TEXT_ENCODER_2, "text_encoders.clip_g.transformer.", "transformers text"),
    (TEXT_ENCODER_3, "text_encoders.t5xxl.transformer.", "t5"),
)
"""Subfolder of a pipeline, prefix in the file, kind of model; the first that matches is taken."""
ALONE = tuple(
    ("", "", kind) for kind in ("unet", "transformer", "vae", "clip", "openai text", "transformers text", "t5")
)
"""The same for a model by itself."""
EMA_PREFIX = "model_ema."
NO_WEIGHTS = frozenset(
    {
        *("alphas_cumprod", "alphas_cumprod_prev", "betas", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        *("lvlb_weights", "logvar", "scale_factor", "denoiser.sigmas", "v_pred", "ztsnr", "global_step"),
        *(f"text_encoders.{name}.logit_scale" for name in ("clip_l", "clip_g", "t5xxl")),
    }
)
"""Tables of the noise schedule, marks, and counters of training."""
OTHERS = {
    "double_blocks.": "FLUX",
    "lora_": "a LoRA",
    ".lora": "a LoRA",
    "control_model.": "a ControlNet",
    "conditioner.embedders.0.model.": "the refiner of Stable Diffusion XL",
    "down_blocks.": "diffusers, which are read as a folder with config.json",
    "vision_model.": "transformers, which are read as a folder with config.json",
}
"""Part of a name → architecture that is not read."""
