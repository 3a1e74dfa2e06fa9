"""An estimate of the memory that activations take in training, from shapes alone: the forward pass of the trained model
on the meta device, whose saved tensors are counted and never allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm_cli.core.condition import NUM_SIZES, Condition
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.checkpointing import Checkpointable
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.llama import LlamaForCausalLM
from ldm_cli.core.models.prior_transformer import PriorTransformer
from ldm_cli.core.models.prior_transformer_config import PriorTransformerConfig
from ldm_cli.core.models.sd3_transformer_2d import SD3Transformer2DModel
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.core.models.vq_model_config import VQModelConfig
from ldm_cli.formats.model_folder import without_weights
from ldm_cli.recipe.ar_recipe import TrainArRecipe
from ldm_cli.recipe.prior_recipe import TrainPriorRecipe
from ldm_cli.recipe.schema import TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.stages.support.text_encoders import t5_length

_TEXT_LENGTH = 77


def activation_bytes(recipe: TrainRecipe, factor: int = 8) -> dict[str, int]:
    """Bytes of the activations of one sample in fp32: `kept`, and `checkpointed` with gradient checkpointing.

    What a backward pass needs of the trained model is counted, each tensor once. Half precision takes half as much. A
    discriminator, a perceptual network and frozen models come and go within a step, and are left out.

    Args:
        recipe: after `start_from` has been read.
        factor: pixels per latent along a side.
    """
    with without_weights(), _FusedAttention():
        model, forward = _with_one_sample(recipe, factor)
        sizes = {"kept": _saved_bytes(model, forward)}
        model.enable_gradient_checkpointing()
        return sizes | {"checkpointed": _saved_bytes(model, forward)}


def _saved_bytes(model: Checkpointable, forward: Callable[[], Any]) -> int:
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            saved[storage] = tensor  # holds the storage, so that no other one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _with_one_sample(recipe: TrainRecipe, factor: int) -> tuple[Checkpointable, Callable[[], Any]]:
    """The trained model of a recipe, and its forward pass of one sample; on the default device."""
    side = recipe.data.image_size
    images = torch.zeros(1, 3, side, side)
    if isinstance(recipe, TrainClipRecipe):
        clip = CLIPModel(recipe.model)
        length = recipe.model.text_config.max_position_embeddings
        return clip, lambda: clip(torch.zeros(1, length, dtype=torch.int64), images)
    if isinstance(recipe, TrainVaeRecipe):
        if isinstance(recipe.model, VQModelConfig):
            vq = VQModel(recipe.model)
            return vq, lambda: vq.decode_codes(vq.encode_z(images))
        vae = AutoencoderKL(recipe.model)
        return vae, lambda: vae.decode_z(vae.posterior(images).mean)
    if isinstance(recipe, TrainArRecipe):
        llama = LlamaForCausalLM(recipe.model)
        length = recipe.text_length + (side // factor) ** 2
        return llama, lambda: llama(torch.zeros(1, length, dtype=torch.int64))
    if isinstance(recipe, TrainPriorRecipe):
        return _prior(recipe.model)
    if not isinstance(recipe, TrainUnetRecipe):
        raise TypeError(f"activation_bytes: {type(recipe).__name__}")
    height = side // factor
    if isinstance(config := recipe.model, SD3Transformer2DConfig):
        transformer = SD3Transformer2DModel(config)
        length = _TEXT_LENGTH * recipe.caption_chunks + t5_length(recipe)
        tokens, pooled = (
            torch.zeros(1, length, config.joint_attention_dim),
            torch.zeros(1, config.pooled_projection_dim),
        )
        latents = torch.zeros(1, config.in_channels, height, height)
        return transformer, lambda: transformer(latents, torch.zeros(1), Condition(tokens, pooled))
    unet, noisy = UNet2DConditionModel(config), torch.zeros(1, config.in_channels, height, height)
    return unet, lambda: unet(noisy, torch.zeros(1), _condition(config, recipe))


def _prior(config: PriorTransformerConfig) -> tuple[Checkpointable, Callable[[], Any]]:
    prior, embedding = PriorTransformer(config), torch.zeros(1, config.embedding_dim)
    tokens, mask = torch.zeros(1, config.num_embeddings, config.embedding_dim), torch.ones(1, config.num_embeddings)
    return prior, lambda: prior(embedding, torch.zeros(1), Condition(tokens, embedding, mask=mask))


def _condition(config: UNet2DConditionConfig, recipe: TrainUnetRecipe) -> Condition:
    """What the U-Net is conditioned on, for one sample."""
    width = config.encoder_hid_dim or max(config.per_level(config.cross_attention_dim))
    clip = _TEXT_LENGTH * recipe.caption_chunks
    length = clip + t5_length(recipe) if recipe.text_encoder_3 else recipe.max_sequence_length or clip
    pooled = None
    if config.addition_embed_type is not None and config.addition_time_embed_dim is not None:
        sizes = NUM_SIZES * config.addition_time_embed_dim
        pooled = torch.zeros(1, (config.projection_class_embeddings_input_dim or 0) - sizes + NUM_SIZES)
    elif config.class_embed_type == "projection":
        pooled = torch.zeros(1, config.projection_class_embeddings_input_dim or 0)
    elif config.num_class_embeds is not None or config.class_embed_type == "timestep":
        pooled = torch.zeros(1, dtype=torch.int64)
    return Condition(torch.zeros(1, length, width), pooled)


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels have it, which save no matrix of weights; that of the meta device does."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            # Saves what a fused kernel saves, queries, keys, values and result, each by another operation.
            return (F.silu(query) + (key * value).sum()).tanh()
        return func(*args, **(kwargs or {}))
