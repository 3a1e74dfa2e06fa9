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

from ldm_cli.bench.race import Runner
from ldm_cli.core.clip_loss import contrastive_loss
from ldm_cli.core.compiling import compile_regions, eagerly
from ldm_cli.core.condition import NUM_SIZES, Condition
from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.diffusion.loss import add_noise, diffusion_loss
from ldm_cli.core.diffusion.process import process_of
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.precision import autocast
from ldm_cli.core.vae_loss import VAELoss
from ldm_cli.recipe.schema import TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.training.optim import GuardedOptimizers
from ldm_cli.training.weights import Weights

TrainRecipe = TrainClipRecipe | TrainVaeRecipe | TrainUnetRecipe
CONTEXT_LENGTH = 77
"""Default text tokens per picture of a U-Net: the context length of every CLIP."""
_MODELS: Mapping[type[TrainRecipe], Callable[..., nn.Module]] = {
    TrainClipRecipe: CLIPModel,
    TrainVaeRecipe: AutoencoderKL,
    TrainUnetRecipe: UNet2DConditionModel,
}


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

    def random_batch(self) -> dict[str, Tensor]:
        """One batch on the device.

        Returns:
            For CLIP `pixels` and `ids`; for the autoencoder `images` and `noise`; for the U-Net `latents`, `noise`, `u`
            and `context`.
        """
        return {name: value.to(self.device) for name, value in _random_batch(self).items()}

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast as the trainers use it."""
        return autocast(self.device, self.recipe.train.precision)


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
    return _MODELS[type(recipe)](recipe.model)


def _random_batch(work: Workload) -> dict[str, Tensor]:
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
    shape_of_latents = (size, unet.in_channels, height, width)
    pooled = {} if unet.addition_embed_type is None else {"pooled": normal(size, _pooled_width(unet))}
    return pooled | {
        "latents": normal(*shape_of_latents),
        "noise": normal(*shape_of_latents),
        "u": torch.rand(size, generator=generator),
        "context": normal(size, work.context_length, max(unet.per_level(unet.cross_attention_dim))),
    }


def _pooled_width(unet: UNet2DConditionConfig) -> int:
    """Numbers of pooled text and sizes that a U-Net with `text_time` takes."""
    width, dim = unet.projection_class_embeddings_input_dim, unet.addition_time_embed_dim
    assert width is not None  # the Config's own check
    assert dim is not None  # the same
    return width - NUM_SIZES * (dim - 1)


def our_step(work: Workload) -> Runner:
    """Our training step on the workload's batch: forward, backward, gradient norm, clipping and optimizer."""
    recipe, train = work.recipe, work.recipe.train
    model, loss = our_training(work)
    optimizers = GuardedOptimizers(Weights({"model": model}), train, torch.device(work.device))

    def update(loss: Tensor) -> None:
        (loss.float() * optimizers.loss_scale).backward()  # type: ignore[no-untyped-call]
        optimizers.step(train.lr, loss)

    def facts() -> dict[str, int]:
        shapes = {name: value.to("meta") for name, value in work.random_batch().items()}
        flops = _flops(recipe, lambda meta: _our_loss(recipe, meta, shapes)().backward())  # type: ignore[no-untyped-call]
        return {"flops": flops, "parameters": sum(p.numel() for p in model.parameters())}

    return training_step(work, loss, update, facts)


def our_training(work: Workload) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Our model, set up as the recipe says, and its loss on the workload's batch."""
    recipe, train = work.recipe, work.recipe.train
    model = build_model(recipe).to(work.device)
    if train.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    if train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if train.compile:
        compile_regions(model)
    else:
        tune_for_cpu(model)
    return model, _our_loss(recipe, model, work.random_batch())


def training_step(
    work: Workload,
    loss: Callable[[], Tensor],
    update: Callable[[Tensor], None],
    facts: Callable[[], dict[str, Any]] = dict,
) -> Runner:
    """One optimizer step; the facts include the loss before the first one."""
    with torch.no_grad(), work.autocast():
        first_loss = loss().item()

    def step() -> None:
        with work.autocast():
            value = loss()
        update(value)

    return Runner(step, work.recipe.train.batch_size, lambda: {"first_loss": first_loss} | facts())


def _our_loss(recipe: TrainRecipe, model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    if isinstance(recipe, TrainClipRecipe):
        return lambda: _clip_loss(*model(batch["ids"], batch["pixels"]))
    if isinstance(recipe, TrainVaeRecipe):
        terms = VAELoss(recipe.loss.model_copy(update={"perceptual_weight": 0.0, "adversarial_weight": 0.0}))
        return lambda: terms(model, batch["images"], batch["noise"], 1)[0]
    condition = Condition(tokens=batch["context"], pooled=batch.get("pooled"))
    return denoising_loss(recipe, batch, lambda x, time: model(x, time, condition))


def _clip_loss(texts: Tensor, images: Tensor, scale: Tensor) -> Tensor:
    return contrastive_loss(images, texts, scale)[0]


def denoising_loss(
    recipe: TrainUnetRecipe, batch: Mapping[str, Tensor], denoise: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    """Mean loss of a batch; `denoise` maps noisy latents [B, C, H, W] and times [B] to predictions [B, C, H, W]."""
    process, x0, noise = process_of(recipe.diffusion), batch["latents"], batch["noise"]

    def loss() -> Tensor:
        a, b, time = process.at(batch["u"])
        output = denoise(add_noise(x0, noise, a, b), time)
        return diffusion_loss(process.prediction, output, x0, noise, a, b, recipe.diffusion.snr_gamma).mean()

    return loss


def our_encoding(work: Workload) -> Runner:
    """The autoencoder's encoder on the workload's images, as `ldm precompute` runs it."""
    vae = build_model(work.recipe).to(work.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tune_for_cpu(vae)
    images = work.random_batch()["images"]

    def facts() -> dict[str, Any]:
        return {"flops": _flops(work.recipe, lambda meta: meta.posterior(images.to("meta")))}

    return encoding_step(work, lambda: vae.posterior(images), facts)


def encoding_step(work: Workload, encode: Callable[[], object], facts: Callable[[], dict[str, Any]] = dict) -> Runner:
    """Images to latents, without gradients."""

    @torch.inference_mode()
    def step() -> None:
        with work.autocast():
            encode()

    return Runner(step, work.recipe.train.batch_size, facts)


def _flops(recipe: TrainRecipe, do: Callable[[Any], object]) -> int:
    """Floating-point operations of matrix products and convolutions, 2 per multiply-add, in `do(model)`.

    They are counted for the plain layers on torch's meta device: independent of CPU kernels, and without the second
    computation of gradient checkpointing. So the fractions of peers and of papers are comparable.
    """
    with torch.device("meta"):
        model = _model(recipe)
    with eagerly(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        do(model)
    return int(counter.get_total_flops())
