"""A pipeline small enough for tests, with random but lively weights."""

import torch

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.tokenizer_config import TokenizerConfig
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.open_family import open_family
from ldm_cli.families.stable_diffusion import StableDiffusion
from ldm_cli.formats.scheduler_file import our_settings
from ldm_cli.sampling.pipeline import Pipeline

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "sample_size": 16,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}


def randomize(module, seed):
    """Every parameter drawn anew, so that no layer is silent; norms stay about one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            is_gain = "norm" in name and name.endswith("weight")
            parameter.copy_(noise / fan_in**0.5 + (1.0 if is_gain else 0.0))
    return module.eval()


def tiny_tokenizer():
    captions = ["a small red circle at the top left", "a blue square", "a green triangle left of a red circle"]
    return Tokenizer.train(captions * 3, TokenizerConfig(vocab_size=600))


def special_ids(tokenizer):
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }


def tiny_pipeline(diffusion=None, context_length=40, **vae):
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(**TEXT, **special_ids(tokenizer), max_position_embeddings=context_length)
    family = StableDiffusion(
        denoiser=randomize(UNet2DConditionModel(UNet2DConditionConfig(**UNET)), 4),
        codec=randomize(AutoencoderKL(AutoencoderKLConfig(**(VAE | vae))), 5),
        encoder=CLIPTextEncoder(randomize(CLIPTextModel(text), 6), tokenizer),
        settings=our_settings((diffusion or DiffusionConfig()).to_mapping()),
    )
    return Pipeline(family)


def loaded_pipeline(folder, precision="fp32", **options):
    return Pipeline(open_family(folder, precision=precision, **options))
