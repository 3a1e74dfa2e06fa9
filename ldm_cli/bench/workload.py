"""Our training step on random data in memory, with the model of a recipe.

Data and initial weights depend on the recipe alone, so that a peer can do the same work on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm_cli.core.clip_loss import contrastive_loss
from ldm_cli.core.compiling import compile_regions, eagerly
from ldm_cli.core.condition import Condition
from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.diffusion.loss import add_noise, diffusion_loss
from ldm_cli.core.diffusion.process import process_of
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.vae_loss import VAELoss
from ldm_cli.recipe.schema import TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.training.optim import GuardedOptimizers
from ldm_cli.training.weights import Weights

TrainRecipe = TrainClipRecipe | TrainVaeRecipe | TrainUnetRecipe
CONTEXT_LENGTH = 77
"""Default text tokens per picture of a U-Net: the context length of every CLIP."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """A model and its setting for a contender.

    Attributes:
        recipe: model, batch size, precision, memory order, checkpointing, compilation.
        device: `cpu` or `cuda`.
        context_length: text tokens per picture, of a U-Net.
    """

    recipe: TrainRecipe
    device: str = "cpu"
    context_length: int = CONTEXT_LENGTH


def with_known_ids(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with special token ids within the vocabulary; training takes them from the tokenizer."""
    if not isinstance(recipe, TrainClipRecipe):
        return recipe
    text = recipe.model.text_config
    if text.eos_token_id < text.vocab_size:
        return recipe
    last = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), text.vocab_size - 1)
    clip = recipe.model.model_copy(update={"text_config": text.model_copy(update=last)})
    return recipe.model_copy(update={"clip": clip})


def build_model(recipe: TrainRecipe) -> nn.Module:
    """The recipe's model with weights that depend on the recipe alone; no parameter is all zero."""
    torch.manual_seed(recipe.seed)
    model = _model(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):  # the last layers of residual branches start at zero
                parameter.normal_(std=0.02)
    return model


def _model(recipe: TrainRecipe) -> nn.Module:
    if isinstance(recipe, TrainClipRecipe):
        return CLIPModel(recipe.model)
    if isinstance(recipe, TrainVaeRecipe):
        return AutoencoderKL(recipe.model)
    return UNet2DConditionModel(recipe.model)


def random_batch(work: Workload) -> dict[str, Tensor]:
    """One batch, on the CPU.

    Returns:
        For CLIP `pixels` and `ids`; for the autoencoder `images` and `noise`; for the U-Net `latents`, `noise`, `u` and
        `context`.
    """
    recipe, size = work.recipe, work.recipe.train.batch_size
    generator = torch.Generator().manual_seed(recipe.seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if isinstance(recipe, TrainClipRecipe):
        text, side = recipe.model.text_config, recipe.model.vision_config.image_size
        shape = (size, text.max_position_embeddings)
        ids = torch.randint(0, max(1, text.vocab_size - 2), shape, generator=generator)
        ids[:, -1] = text.eos_token_id
        return {"pixels": normal(size, 3, side, side), "ids": ids}
    if isinstance(recipe, TrainVaeRecipe):
        side = recipe.data.image_size
        latent = side >> (len(recipe.model.block_out_channels) - 1)
        images = normal(size, recipe.model.in_channels, side, side).clamp(-1, 1)
        return {"images": images, "noise": normal(size, recipe.model.latent_channels, latent, latent)}
    unet = recipe.model
    height, width = unet.sample_size if isinstance(unet.sample_size, tuple) else (unet.sample_size or 64,) * 2
    width_of_text = max(unet.per_level(unet.cross_attention_dim))
    shape_of_latents = (size, unet.in_channels, height, width)
    return {
        "latents": normal(*shape_of_latents),
        "noise": normal(*shape_of_latents),
        "u": torch.rand(size, generator=generator),
        "context": normal(size, work.context_length, width_of_text),
    }


class TrainingStep:
    """Forward, backward, gradient norm, clipping and AdamW, as the trainers do them.

    Args:
        work: the workload.
        model: on its device, in its memory order.
        batch: from `random_batch`, on the same device.
    """

    def __init__(self, work: Workload, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self.recipe, self.train = work.recipe, work.recipe.train
        self.model, self.batch, self.loss = model, batch, _our_loss(work.recipe, model, batch)
        self.device = next(model.parameters()).device
        self.optimizers = GuardedOptimizers(Weights({"model": model}), self.train, self.device)
        with torch.no_grad(), autocast(self.device, self.train.precision):
            self.first_loss = self.loss().item()

    def step(self) -> None:
        """One optimizer step."""
        with autocast(self.device, self.train.precision):
            loss = self.loss()
        (loss.float() * self.optimizers.loss_scale).backward()  # type: ignore[no-untyped-call]
        self.optimizers.step(self.train.lr, loss)

    def facts(self) -> dict[str, Any]:
        """Units and counted operations per step, parameters, and the first loss."""
        parameters = sum(p.numel() for p in self.model.parameters())
        return {
            "units": self.train.batch_size,
            "flops": training_flops(self.recipe, self.batch),
            "parameters": parameters,
            "first_loss": self.first_loss,
        }


def our_step(work: Workload) -> TrainingStep:
    """Our training step on the workload's batch."""
    recipe, device = work.recipe, torch.device(work.device)
    model = build_model(recipe).to(device)
    if recipe.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    if recipe.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.train.compile:
        compile_regions(model)
    else:
        tune_for_cpu(model)
    batch = {name: value.to(device) for name, value in random_batch(work).items()}
    return TrainingStep(work, model, batch)


def _our_loss(recipe: TrainRecipe, model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    if isinstance(recipe, TrainClipRecipe):
        return lambda: _clip_loss(model, batch)
    if isinstance(recipe, TrainVaeRecipe):
        terms = VAELoss(recipe.loss.model_copy(update={"perceptual_weight": 0.0, "adversarial_weight": 0.0}))
        return lambda: terms(model, batch["images"], batch["noise"], 1)[0]
    process = process_of(recipe.diffusion)
    x0, noise = batch["latents"], batch["noise"]

    def loss() -> Tensor:
        a, b, time = process.at(batch["u"])
        output = model(add_noise(x0, noise, a, b), time, Condition(tokens=batch["context"]))
        return diffusion_loss(process.prediction, output, x0, noise, a, b, recipe.diffusion.snr_gamma).mean()

    return loss


def _clip_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    texts, images, scale = model(batch["ids"], batch["pixels"])
    return contrastive_loss(images, texts, scale)[0]


class EncodingStep:
    """Images to latents, as `ldm precompute` does it: no gradients."""

    def __init__(self, work: Workload, encode: Callable[[], object], images: Tensor) -> None:
        self.recipe, self.device = work.recipe, torch.device(work.device)
        self.encode, self.images = encode, images

    @torch.inference_mode()
    def step(self) -> None:
        """One batch."""
        with autocast(self.device, self.recipe.train.precision):
            self.encode()

    def facts(self) -> dict[str, Any]:
        """Images and counted operations a batch."""
        return {"units": len(self.images), "flops": encoding_flops(self.recipe, self.images)}


def our_encoding(work: Workload) -> EncodingStep:
    """The autoencoder's encoder on the workload's images."""
    recipe, device = work.recipe, torch.device(work.device)
    if not isinstance(recipe, TrainVaeRecipe):
        raise ValueError(f"recipe of {recipe.command}, expected train-vae")
    vae = build_model(recipe).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tune_for_cpu(vae)
    images = random_batch(work)["images"].to(device)
    return EncodingStep(work, lambda: vae.posterior(images), images)


def training_flops(recipe: TrainRecipe, batch: Mapping[str, Tensor]) -> int:
    """Floating-point operations of matrix products and convolutions, 2 per multiply-add, forward and backward.

    They are counted for the plain layers on torch's meta device: independent of CPU kernels, and without the second
    computation of gradient checkpointing. So the fractions of peers and of papers are comparable.
    """
    loss = _our_loss(recipe, _meta_model(recipe), {name: value.to("meta") for name, value in batch.items()})
    return _count(lambda: loss().backward())  # type: ignore[no-untyped-call]


def encoding_flops(recipe: TrainRecipe, images: Tensor) -> int:
    """Floating-point operations of encoding images [B, 3, H, W]."""
    model = _meta_model(recipe)
    with torch.no_grad():
        return _count(lambda: model.posterior(images.to("meta")))  # type: ignore[operator]


def _meta_model(recipe: TrainRecipe) -> nn.Module:
    """The recipe's model on the meta device, without storage."""
    with torch.device("meta"):
        return _model(recipe)


def _count(do: Callable[[], object]) -> int:
    with eagerly(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        do()
    return int(counter.get_total_flops())


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Autocast as the trainers use it."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
