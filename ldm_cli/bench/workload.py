"""The work of a training step, ours: a recipe's model on random data that stays in memory.

Data and first weights are functions of the recipe alone, so that a peer can do the same work on the same numbers.
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

from ldm_cli.allocator import keep_freed_memory
from ldm_cli.core.clip_loss import contrastive_loss
from ldm_cli.core.compiling import compile_regions, eagerly
from ldm_cli.core.diffusion.loss import diffusion_loss
from ldm_cli.core.diffusion.schedule import NoiseSchedule
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.vae_loss import VAELoss
from ldm_cli.recipe.schema import TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.optim import GuardedOptimizers
from ldm_cli.training.weights import Weights

TrainRecipe = TrainClipRecipe | TrainVaeRecipe | TrainUnetRecipe
CONTEXT_LENGTH = 77
"""Text tokens per picture of a U-Net's work, unless its workload says otherwise: what every CLIP has."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """What a contender trains.

    Attributes:
        recipe: model, batch size, precision, memory order, checkpointing, compilation.
        device: `cpu` or `cuda`.
        context_length: text tokens per picture, of a U-Net.
    """

    recipe: TrainRecipe
    device: str = "cpu"
    context_length: int = CONTEXT_LENGTH


def build_model(recipe: TrainRecipe) -> nn.Module:
    """The recipe's model with weights that depend on the recipe alone; none of its layers is silent."""
    torch.manual_seed(recipe.seed)
    model: nn.Module
    if isinstance(recipe, TrainClipRecipe):
        model = CLIPModel(recipe.clip)
    elif isinstance(recipe, TrainVaeRecipe):
        model = AutoencoderKL(recipe.vae)
    else:
        model = UNet2DConditionModel(recipe.unet)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):  # the last layers of residual branches start at zero
                parameter.normal_(std=0.02)
    return model


def random_batch(work: Workload) -> dict[str, Tensor]:
    """One batch, on the CPU.

    Returns:
        Of CLIP `pixels` and `ids`, of the autoencoder `images` and `noise`, of the U-Net `latents`, `noise`, `t` and
        `context`.
    """
    recipe, size = work.recipe, work.recipe.train.batch_size
    generator = torch.Generator().manual_seed(recipe.seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if isinstance(recipe, TrainClipRecipe):
        text, side = recipe.clip.text_config, recipe.clip.vision_config.image_size
        shape = (size, text.max_position_embeddings)
        ids = torch.randint(0, max(1, text.vocab_size - 2), shape, generator=generator)
        ids[:, -1] = text.eos_token_id
        return {"pixels": normal(size, 3, side, side), "ids": ids}
    if isinstance(recipe, TrainVaeRecipe):
        side = recipe.data.image_size
        latent = side >> (len(recipe.vae.block_out_channels) - 1)
        images = normal(size, recipe.vae.in_channels, side, side).clamp(-1, 1)
        return {"images": images, "noise": normal(size, recipe.vae.latent_channels, latent, latent)}
    unet = recipe.unet
    height, width = unet.sample_size if isinstance(unet.sample_size, tuple) else (unet.sample_size or 64,) * 2
    width_of_text = max(unet.per_level(unet.cross_attention_dim))
    shape_of_latents = (size, unet.in_channels, height, width)
    return {
        "latents": normal(*shape_of_latents),
        "noise": normal(*shape_of_latents),
        "t": torch.randint(0, recipe.diffusion.num_train_timesteps, (size,), generator=generator),
        "context": normal(size, work.context_length, width_of_text),
    }


class TrainingStep:
    """Forward, backward, gradient norm, clipping and AdamW, as the trainers do them.

    Args:
        model: on its device, in its memory order.
        loss: scalar loss of the batch.
        train: precision, clipping, optimizer.
        num_units: images (or pairs) a step.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], train: TrainConfig, num_units: int) -> None:
        self.model, self.loss, self.train, self.num_units = model, loss, train, num_units
        self.device = next(model.parameters()).device
        self.optimizers = GuardedOptimizers(Weights({"model": model}), train, self.device)
        with torch.no_grad(), autocast(self.device, train.precision):
            self.first_loss = loss().item()

    def step(self) -> None:
        """One optimizer step."""
        with autocast(self.device, self.train.precision):
            loss = self.loss()
        (loss.float() * self.optimizers.loss_scale).backward()  # type: ignore[no-untyped-call]
        self.optimizers.step(self.train.lr, loss)

    def facts(self) -> dict[str, Any]:
        """Units and counted operations a step, parameters, and the first loss."""
        parameters = sum(p.numel() for p in self.model.parameters())
        flops = count_flops(lambda: self.loss().backward())  # type: ignore[no-untyped-call]
        self.model.zero_grad(set_to_none=True)
        return {"units": self.num_units, "flops": flops, "parameters": parameters, "first_loss": self.first_loss}


def our_step(work: Workload) -> TrainingStep:
    """Our training step on the workload's batch."""
    recipe, device = work.recipe, torch.device(work.device)
    if device.type == "cpu":
        keep_freed_memory()
    model = build_model(recipe).to(device)
    if recipe.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    if recipe.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.train.compile:
        compile_regions(model)
    batch = {name: value.to(device) for name, value in random_batch(work).items()}
    return TrainingStep(model, _our_loss(recipe, model, batch), recipe.train, recipe.train.batch_size)


def _our_loss(recipe: TrainRecipe, model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    if isinstance(recipe, TrainClipRecipe):
        return lambda: _clip_loss(model, batch)
    if isinstance(recipe, TrainVaeRecipe):
        terms = VAELoss(recipe.loss.model_copy(update={"perceptual_weight": 0.0, "adversarial_weight": 0.0}))
        return lambda: terms(model, batch["images"], batch["noise"], 1)[0]
    schedule = NoiseSchedule.from_config(recipe.diffusion)
    x0, noise, t = batch["latents"], batch["noise"], batch["t"]

    def loss() -> Tensor:
        output = model(schedule.add_noise(x0, noise, t), t, batch["context"])
        return diffusion_loss(schedule, output, x0, noise, t, recipe.diffusion.snr_gamma).mean()

    return loss


def _clip_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    texts, images, scale = model(batch["ids"], batch["pixels"])
    return contrastive_loss(images, texts, scale)[0]


class EncodingStep:
    """Images to latents, as `ldm precompute` does it: no gradients."""

    def __init__(self, encode: Callable[[], object], device: torch.device, precision: str, num_units: int) -> None:
        self.encode, self.device, self.precision, self.num_units = encode, device, precision, num_units

    @torch.inference_mode()
    def step(self) -> None:
        """One batch."""
        with autocast(self.device, self.precision):
            self.encode()

    def facts(self) -> dict[str, Any]:
        """Images and counted operations a batch."""
        return {"units": self.num_units, "flops": count_flops(self.step)}


def our_encoding(work: Workload) -> EncodingStep:
    """The autoencoder's encoder on the workload's images."""
    recipe, device = work.recipe, torch.device(work.device)
    if not isinstance(recipe, TrainVaeRecipe):
        raise ValueError(f"recipe of {recipe.command}, expected train-vae")
    if device.type == "cpu":
        keep_freed_memory()
    vae = build_model(recipe).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = random_batch(work)["images"].to(device)
    return EncodingStep(lambda: vae.encode(images).mean, device, recipe.train.precision, len(images))


def count_flops(do: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions, 2 per multiply-add, counted as they run.

    Attention runs as plain products meanwhile, because the counter does not know the CPU's fused kernel.
    """
    with eagerly(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        do()
    return int(counter.get_total_flops())


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Autocast as the trainers use it."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
