"""The model that a recipe trains, on random numbers: for peers, and to count operations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm_cli.bench.stand_ins import CONTEXT_LENGTH, pooled_width, unet_of
from ldm_cli.core.clip_loss import contrastive_loss
from ldm_cli.core.condition import NUM_SIZES, Condition
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.families.codec_folder import trained_class
from ldm_cli.recipe.schema import TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.stages.support.model_sizes import count_parameters


def random_batch(
    recipe: TrainRecipe, num_samples: int, device: str, context_length: int = CONTEXT_LENGTH
) -> dict[str, Tensor]:
    """A batch as the recipe's model takes it.

    Returns:
        For CLIP `ids` [B, L] and `pixels` [B, 3, H, W]; for an autoencoder `images` [B, C, H, W]; for a U-Net `latents`
        [B, C, h, w], `timesteps` [B], `tokens` [B, L, D], and of Stable Diffusion XL `pooled` [B, P + 6].
    """
    if isinstance(recipe, TrainClipRecipe):
        text, side = recipe.model.text_config, recipe.model.vision_config.image_size
        ids = torch.randint(0, max(1, text.vocab_size - 2), (num_samples, text.max_position_embeddings), device=device)
        ids[:, -1] = text.vocab_size - 1
        return {"ids": ids, "pixels": torch.randn(num_samples, 3, side, side, device=device)}
    if isinstance(recipe, TrainVaeRecipe):
        side = recipe.data.image_size
        images = torch.rand(num_samples, recipe.model.in_channels, side, side, device=device)
        return {"images": images * 2 - 1}
    if not isinstance(recipe, TrainUnetRecipe):
        raise TypeError(f"no random batch for a {type(recipe).__name__}")
    unet = unet_of(recipe)
    height, width = unet.sample_size if isinstance(unet.sample_size, tuple) else (unet.sample_size or 64,) * 2
    channels = max(unet.per_level(unet.cross_attention_dim))
    pooled = {}
    if unet.addition_embed_type is not None:
        pooled["pooled"] = torch.randn(num_samples, pooled_width(unet) + NUM_SIZES, device=device)
    return pooled | {
        "latents": torch.randn(num_samples, unet.in_channels, height, width, device=device),
        "timesteps": torch.randint(0, recipe.diffusion.num_train_timesteps, (num_samples,), device=device),
        "tokens": torch.randn(num_samples, context_length, channels, device=device),
    }


def size_of(recipe: TrainRecipe, context_length: int = CONTEXT_LENGTH) -> tuple[int, int]:
    """Parameters of the model that the recipe trains, and operations of its forward and backward pass on one sample.

    The operations are those of matrix products and convolutions, 2 per multiply-add, of the plain layers on torch's
    meta device: independent of kernels, without the second computation of gradient checkpointing, and without the
    frozen models of a step. So the fractions of peers and of papers are comparable.
    """
    batch = random_batch(recipe, 1, "meta", context_length)
    with torch.device("meta"):
        model = new_model(recipe)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        simple_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    return count_parameters(model), int(counter.get_total_flops())


def new_model(recipe: TrainRecipe) -> nn.Module:
    """The model that the recipe trains, with random weights."""
    if isinstance(recipe, TrainClipRecipe):
        return CLIPModel(recipe.model)
    if isinstance(recipe, TrainVaeRecipe):
        return trained_class(recipe.model)(recipe.model)
    if isinstance(recipe, TrainUnetRecipe):
        return UNet2DConditionModel(unet_of(recipe))
    raise TypeError(f"no model of a {type(recipe).__name__}")


def simple_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A scalar that depends on every output of the model: its contrastive loss, else the mean square."""
    if isinstance(model, CLIPModel):
        texts, images, scale = model(batch["ids"], batch["pixels"])
        return contrastive_loss(images, texts, scale)[0]
    if isinstance(model, AutoencoderKL):
        return model.decode(model.posterior(batch["images"]).mean).square().mean()
    if isinstance(model, VQModel):
        return model.decode_codes(model.encode_z(batch["images"])).square().mean()
    condition = Condition(tokens=batch["tokens"], pooled=batch.get("pooled"))
    output: Tensor = model(batch["latents"], batch["timesteps"].float(), condition)
    return output.square().mean()
