"""Every field of the configurations of diffusers and transformers that we read, and what becomes of it.

A field is *honoured*: any value that the library takes works, and does the same; *refused*: another value than the
neutral one is an error that names the field; or *harmless*: it changes nothing in either program. The tables of
docs/foreign-models.md are written from this.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.processing_utils import ImagesKwargs
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_tiny import AutoencoderTiny
from ldm_cli.core.models.clip import CLIPModel, CLIPTextModel, CLIPVisionModel
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.tokenizer_config import TokenizerConfig
from tests.core.models.weights import randomise
from tests.parity.foreign import Content, Foreign, parameters_of
from tests.parity.foreign_schedulers import SCHEDULERS
from tests.parity.test_models import unet_conditions, with_prefix


def unet_predictions(content: Content) -> tuple[Tensor, Tensor]:
    config = UNet2DConditionConfig.from_hugging_face(content)
    ours, theirs = UNet2DConditionModel(config).eval(), diffusers.UNet2DConditionModel.from_config(dict(content)).eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(0)
    sample, text = (
        torch.randn(2, config.in_channels, 8, 8),
        torch.randn(2, 3, config.per_level(config.cross_attention_dim)[0]),
    )
    condition, their_conditions = unet_conditions(config, 2)
    condition, their_conditions["encoder_hidden_states"] = replace(condition, tokens=text), text
    time = torch.tensor([7.0])
    with torch.no_grad():
        return ours(sample, time, condition), theirs(sample, time, **their_conditions).sample


def _codecs(kind: Any, content: Content) -> tuple[Any, Any, Tensor]:
    """Our codec and theirs with the same random weights, and pictures."""
    ours = kind(kind.config_class.from_hugging_face(content)).eval()
    theirs = getattr(diffusers, kind.__name__).from_config(dict(content)).eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(0)
    return ours, theirs, torch.rand(2, theirs.config.in_channels, 16, 16)


def vae_images(content: Content) -> tuple[Any, Any]:
    """Latents and reconstructions."""
    ours, theirs, images = _codecs(AutoencoderKL, content)
    with torch.no_grad():
        mean = theirs.encode(images).latent_dist.mean
        shift, scale = theirs.config.shift_factor or 0.0, theirs.config.scaling_factor
        latents = (mean - shift) * scale
        found = torch.cat((ours.encode(images).flatten(), ours.decode(latents).flatten()))
        return found, torch.cat((latents.flatten(), theirs.decode(mean).sample.flatten()))


def tiny_images(content: Content) -> tuple[Any, Any]:
    """Latents and reconstructions of the tiny autoencoder."""
    ours, theirs, images = _codecs(AutoencoderTiny, content)
    with torch.no_grad():
        latents = theirs.encode(images).latents
        found = torch.cat((ours.encode(images).flatten(), ours.decode(ours.encode(images)).flatten()))
        scaled = latents * theirs.config.scaling_factor
        return found, torch.cat((scaled.flatten(), theirs.decode(latents).sample.flatten()))


def quantized_images(content: Content) -> tuple[Any, Any]:
    """Latents and reconstructions of the autoencoder with a codebook."""
    ours, theirs, images = _codecs(VQModel, content)
    with torch.no_grad():
        z = theirs.encode(images).latents
        scaled = z * theirs.config.scaling_factor
        found = torch.cat((ours.encode(images).flatten(), ours.decode(scaled).flatten()))
        return found, torch.cat((scaled.flatten(), theirs.decode(z).sample.flatten()))


def text_states(content: Content) -> tuple[Tensor, Tensor]:
    ours = CLIPTextModel(CLIPTextConfig.from_hugging_face(content)).eval()
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**content)).eval()
    randomise(theirs)
    ours.load_state_dict(with_prefix(theirs.state_dict()))
    ids = torch.tensor([[58, 5, 59, 7, 2], [58, 59, 3, 59, 1]])
    with torch.no_grad():
        found, expected = ours(ids), theirs(ids, return_dict=True)
    return (
        torch.cat((found.last_hidden_state.flatten(), found.pooled.flatten())),
        torch.cat((expected.last_hidden_state.flatten(), expected.pooler_output.flatten())),
    )


def vision_features(content: Content) -> tuple[Tensor, Tensor]:
    ours = CLIPVisionModel(CLIPVisionConfig.from_hugging_face(content)).eval()
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**content)).eval()
    randomise(theirs)
    state = theirs.state_dict()
    ours.load_state_dict({k if k.startswith("vision_model.") else f"vision_model.{k}": v for k, v in state.items()})
    torch.manual_seed(0)
    pixels = torch.randn(2, theirs.config.num_channels, theirs.config.image_size, theirs.config.image_size)
    with torch.no_grad():
        return ours(pixels).pooled, theirs(pixels, return_dict=True).pooler_output


def clip_features(content: Content) -> tuple[Any, Any]:
    """Both features, and the initial scale of the logits."""
    theirs_config = transformers.CLIPConfig(**copy.deepcopy(dict(content)))
    ours = CLIPModel(CLIPConfig.from_hugging_face(content)).eval()
    theirs = transformers.CLIPModel(theirs_config).eval()
    scales = ours.logit_scale.detach().clone(), theirs.logit_scale.detach().clone()
    randomise(theirs)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")})
    torch.manual_seed(0)
    ids, pixels = torch.tensor([[58, 5, 59]]), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels, return_dict=True)
        texts, images = ours.get_text_features(ids), ours.get_image_features(pixels)
    found = [F.normalize(features, dim=-1).flatten() for features in (texts, images)]
    return (
        torch.cat((*found, scales[0][None])),
        torch.cat((expected.text_embeds.flatten(), expected.image_embeds.flatten(), scales[1][None])),
    )


TEXTS = ["a red! circle", "a <s1> ball", "A <S1>!", ""]


def token_ids(content: Content) -> tuple[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train(["a red circle"], TokenizerConfig(vocab_size=514)).save(folder)
        (Path(folder) / "special_tokens_map.json").unlink()
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(content))
        ours, theirs = Tokenizer.load(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    length = min(theirs.model_max_length, 77)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=length).input_ids
    return torch.tensor(ours.encode(TEXTS).input_ids.tolist()), torch.tensor(expected)


def tokenizer_names() -> set[str]:
    """What CLIPTokenizer, or a class that it is made of, takes out of its settings."""
    names, known = (
        set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES),
        r"kwargs\.(?:pop|get|setdefault)\(\s*\"(\w+)\"",
    )
    for tokenizer in (transformers.CLIPTokenizer, TokenizersBackend, PreTrainedTokenizerBase):
        names |= parameters_of(tokenizer.__init__) | set(re.findall(known, inspect.getsource(tokenizer.__init__)))
    names |= set(re.findall(known, inspect.getsource(PreTrainedTokenizerBase._from_pretrained)))
    return {name for name in names if not name.startswith("_")} - NOT_IN_FILES


# Arguments that are objects or paths, and no settings of a file.
NOT_IN_FILES = {
    *(
        "vocab",
        "merges",
        "vocab_file",
        "tokenizer_file",
        "tokenizer_object",
        "gguf_file",
        "tokenizer",
        "post_processor",
    ),
    *("tokenizer_padding", "tokenizer_truncation", "init_inputs", "files_loaded", "model_specific_special_tokens"),
}


def prepared_images(content: Content) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    ours = CLIPImageProcessor.from_hugging_face(content)
    found = ours(torch.from_numpy(image).permute(2, 0, 1)[None])
    expected = CLIPImageProcessorPil(**content)(image, return_tensors="pt")["pixel_values"].float()
    # Pillow resizes with fixed-point weights: a level may differ.
    level = (ours.rescale_factor if ours.do_rescale else 1.0) / (min(ours.image_std) if ours.do_normalize else 1.0)
    return torch.where((found - expected).abs() < 1.001 * level, expected, found), expected


UNET = Foreign(
    "UNet2DConditionModel",
    "unet/config.json",
    parameters_of(diffusers.UNet2DConditionModel.__init__),
    {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    unet_predictions,
    honoured={
        "in_channels": [9],
        "out_channels": [8],
        "flip_sin_to_cos": [False, None],
        "freq_shift": [1],
        "down_block_types": [["CrossAttnDownBlock2D"] * 2],
        "mid_block_type": ["UNetMidBlock2D", None],
        "up_block_types": [["CrossAttnUpBlock2D"] * 2],
        "block_out_channels": [[16, 8]],
        "layers_per_block": [2, [1, 2]],
        "act_fn": ["swish"],
        "norm_num_groups": [8],
        "norm_eps": [1e-3],
        "cross_attention_dim": [6, [12, 12]],
        "transformer_layers_per_block": [2, [2, 1]],
        "attention_head_dim": [4, [4, 2]],
        "use_linear_projection": [True, None],
        "class_embed_type": ["timestep", "identity", {"projection_class_embeddings_input_dim": 6, "": "projection"}],
        "addition_embed_type": [
            {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 58, "": "text_time"}
        ],
        "addition_time_embed_dim": [
            {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 34, "": 4}
        ],
        "projection_class_embeddings_input_dim": [{"class_embed_type": "projection", "": 6}],
        "num_class_embeds": [5],
        "only_cross_attention": [[True, False], True],
        "encoder_hid_dim": [{"encoder_hid_dim_type": "text_proj", "": 12}],
        "encoder_hid_dim_type": [{"encoder_hid_dim": 12, "": "text_proj"}],
        "resnet_time_scale_shift": ["scale_shift"],
        "time_embedding_dim": [24],
        "time_cond_proj_dim": [6],
        "sample_size": [[8, 16], None],
    },
    refused={
        "center_input_sample": True,
        "downsample_padding": 0,
        "mid_block_scale_factor": 2.0,
        "dropout": 0.1,
        "reverse_transformer_layers_per_block": [[1], [1]],
        "num_attention_heads": 4,
        "dual_cross_attention": True,
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 2.0,
        "time_embedding_type": "fourier",
        "time_embedding_act_fn": "silu",
        "timestep_post_act": "silu",
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "attention_type": "gated",
        "class_embeddings_concat": True,
        "mid_block_only_cross_attention": True,
        "cross_attention_norm": "layer_norm",
    },
    harmless={"upcast_attention": True, "addition_embed_type_num_heads": 8},
)
VAE = Foreign(
    "AutoencoderKL",
    "vae/config.json",
    parameters_of(diffusers.AutoencoderKL.__init__),
    {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
    },
    vae_images,
    honoured={
        "in_channels": [1],
        "out_channels": [4],
        "down_block_types": [
            {"up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [8], "": ["DownEncoderBlock2D"]},
            ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        ],
        "up_block_types": [
            {"down_block_types": ["DownEncoderBlock2D"], "block_out_channels": [8], "": ["UpDecoderBlock2D"]},
            ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        ],
        "block_out_channels": [[16, 8]],
        "layers_per_block": [2],
        "act_fn": ["swish"],
        "latent_channels": [16],
        "norm_num_groups": [8],
        "scaling_factor": [0.5],
        "force_upcast": [False],
        "shift_factor": [0.25],
        "use_quant_conv": [False, None],
        "use_post_quant_conv": [False, None],
        "mid_block_add_attention": [False, None],
    },
    refused={"latents_mean": [0.0, 0.1, 0.0, 0.0], "latents_std": [1.0, 1.0, 2.0, 1.0]},
    harmless={"sample_size": [64, 32]},
)
VQ = Foreign(
    "VQModel",
    "vae/config.json",
    parameters_of(diffusers.VQModel.__init__),
    {**VAE.base, "num_vq_embeddings": 24},
    quantized_images,
    honoured={
        **{name: VAE.honoured[name] for name in ("in_channels", "out_channels", "down_block_types", "up_block_types")},
        **{name: VAE.honoured[name] for name in ("block_out_channels", "layers_per_block", "act_fn")},
        **{name: VAE.honoured[name] for name in ("norm_num_groups", "scaling_factor", "mid_block_add_attention")},
        "latent_channels": [4],
        "num_vq_embeddings": [5],
        "vq_embed_dim": [6],
    },
    refused={"norm_type": "spatial"},
    harmless={"sample_size": 64, "lookup_from_codebook": True, "force_upcast": True},
)
TINY_VAE = Foreign(
    "AutoencoderTiny",
    "vae/config.json",
    parameters_of(diffusers.AutoencoderTiny.__init__) | {"block_out_channels"},
    {
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "num_encoder_blocks": [1, 2],
        "num_decoder_blocks": [2, 1],
    },
    tiny_images,
    honoured={
        "in_channels": [1],
        "out_channels": [4],
        "encoder_block_out_channels": [[16, 16]],
        "decoder_block_out_channels": [[16, 16]],
        "act_fn": ["silu", "swish", "gelu", "mish"],
        "latent_channels": [16],
        "num_encoder_blocks": [[2, 0]],
        "num_decoder_blocks": [[1, 3]],
        "scaling_factor": [0.5],
    },
    refused={"upsample_fn": "bilinear", "upsampling_scaling_factor": 4, "shift_factor": 0.5},
    harmless={"latent_magnitude": 2, "latent_shift": 0.25, "force_upcast": True, "block_out_channels": [16, 16]},
)
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT_SIZES = {**SIZES, "vocab_size": 60, "max_position_embeddings": 8, "eos_token_id": 59}
VISION_SIZES = {**SIZES, "image_size": 8, "patch_size": 4}
TOWER: dict[str, list[Any]] = {
    "hidden_size": [12],
    "intermediate_size": [20],
    "num_hidden_layers": [1],
    "num_attention_heads": [4],
    "hidden_act": ["gelu"],
    "layer_norm_eps": [0.1],
}
BOOKKEEPING: dict[str, Any] = {
    "_name_or_path": "x",
    "architectures": ["X"],
    "chunk_size_feed_forward": 3,
    "dtype": "float32",
    "id2label": {"0": "x"},
    "initializer_factor": 2.0,
    "is_encoder_decoder": True,
    "label2id": {"x": 0},
    "output_attentions": False,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
    "transformers_version": "4.0.0",
}
TEXT = Foreign(
    "CLIPTextConfig",
    "text_encoder/config.json",
    {f.name for f in fields(transformers.CLIPTextConfig)} | set(transformers.CLIPTextConfig().to_dict()),
    TEXT_SIZES,
    text_states,
    honoured={
        **TOWER,
        "vocab_size": [70],
        "max_position_embeddings": [6],
        "eos_token_id": [2, 7],
        "projection_dim": [None, 20],
    },
    refused={"model_type": "clip"},
    harmless={
        **BOOKKEEPING,
        "bos_token_id": None,
        "pad_token_id": 0,
        "attention_dropout": 0.1,
        "initializer_range": 0.1,
    },
)
VISION = Foreign(
    "CLIPVisionConfig",
    "vision_config of a CLIP's config.json",
    {f.name for f in fields(transformers.CLIPVisionConfig)} | set(transformers.CLIPVisionConfig().to_dict()),
    VISION_SIZES,
    vision_features,
    honoured={**TOWER, "num_channels": [4], "image_size": [16], "patch_size": [8], "projection_dim": [20]},
    refused={"model_type": "clip"},
    harmless={**BOOKKEEPING, "attention_dropout": 0.1, "initializer_range": 0.1},
)
CLIP = Foreign(
    "CLIPConfig",
    "config.json of a CLIP",
    {f.name for f in fields(transformers.CLIPConfig)} | set(transformers.CLIPConfig().to_dict()),
    {"text_config": TEXT_SIZES, "vision_config": VISION_SIZES, "projection_dim": 6},
    clip_features,
    honoured={
        "text_config": [
            {**TEXT_SIZES, "hidden_act": "gelu"},
            {"text_config_dict": {**TEXT_SIZES, "layer_norm_eps": 0.1}, "": {**TEXT_SIZES, "hidden_act": "gelu"}},
        ],
        "vision_config": [
            {**VISION_SIZES, "layer_norm_eps": 0.1},
            {"vision_config_dict": VISION_SIZES, "": {**VISION_SIZES, "hidden_act": "gelu"}},
        ],
        "projection_dim": [4],
        "logit_scale_init_value": [1.0],
    },
    refused={"model_type": "siglip"},
    harmless={**BOOKKEEPING, "return_dict": True},
)
TOKENIZER = Foreign(
    "CLIPTokenizer",
    "tokenizer/tokenizer_config.json",
    tokenizer_names() | {"do_lower_case", "errors"},
    {},
    token_ids,
    honoured={
        "added_tokens_decoder": [{"514": {"content": "<s1>", "lstrip": True}}],
        "additional_special_tokens": [["<s1>"]],
        "extra_special_tokens": [["<s1>"]],
        "sep_token": ["<s1>"],
        "cls_token": ["<s1>"],
        "mask_token": ["<s1>"],
        "pad_token": ["!", "<s1>"],
        "model_max_length": [5, 1e30],
        "max_len": [6],
    },
    refused={
        "bos_token": "!",
        "eos_token": "!",
        "unk_token": "!",
        "padding_side": "left",
        "truncation_side": "left",
        "split_special_tokens": True,
    },
    harmless={
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": True,
        "backend": "tokenizers",
        "chat_control_tokens": None,
        "chat_template": "{{ x }}",
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
        "do_lower_case": False,
        "errors": "strict",
        "fix_mistral_regex": False,
        "max_length": 5,
        "model_input_names": ["input_ids"],
        "name_or_path": "x",
        "pad_to_multiple_of": 8,
        "pad_token_type_id": 1,
        "processor_class": "CLIPProcessor",
        "response_schema": None,
        "response_template": None,
        "stride": 2,
        "tokenizer_class": "CLIPTokenizer",
        "truncation_strategy": "longest_first",
        "unk_id": 3,
        "verbose": True,
    },
)
IMAGES = Foreign(
    "CLIPImageProcessor",
    "preprocessor_config.json of a CLIP",
    set(ImagesKwargs.__annotations__) | set(CLIPImageProcessorPil().to_dict()),
    {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}},
    prepared_images,
    honoured={
        "do_resize": [False],
        "size": [24, {"height": 50, "width": 24}],
        "resample": [2],
        "do_center_crop": [False],
        "crop_size": [16, {"height": 28, "width": 16}],
        "do_rescale": [False],
        "rescale_factor": [1 / 127.5],
        "do_normalize": [False],
        "image_mean": [[0.0, 0.0, 0.0]],
        "image_std": [[1.0, 1.0, 1.0]],
    },
    refused={"do_pad": True},
    harmless={
        "data_format": "channels_first",
        "default_to_square": True,
        "device": "cpu",
        "disable_grouping": True,
        "do_convert_rgb": False,
        "image_processor_type": "CLIPImageProcessor",
        "image_seq_length": 5,
        "input_data_format": None,
        "pad_size": {"height": 64, "width": 64},
        "return_tensors": "pt",
    },
)
CLASSES = (UNET, VAE, TINY_VAE, VQ, TEXT, VISION, CLIP, TOKENIZER, IMAGES, *SCHEDULERS)
