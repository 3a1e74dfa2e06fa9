"""The same work by diffusers, transformers and webdataset. Only this file imports them, and only for comparisons.

Each peer runs as in its own documentation. A faster setting of it (memory order) is a further contender, and the
fastest one counts. A peer's batch is in memory already: it reads and decodes nothing, and keeps no average.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.bench.race import Turns
from ldm_cli.bench.workload import random_batch
from ldm_cli.core.condition import NUM_SIZES
from ldm_cli.core.precision import autocast
from ldm_cli.recipe.schema import TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.recipe.train_recipe import TrainRecipe


def train(turns: Turns, recipe: TrainRecipe, device: str, channels_last: bool = False, compiled: bool = False) -> None:
    """Training steps of the recipe's model, with clipping and AdamW as in the peer's scripts."""
    config = recipe.train
    model = peer_model(recipe).to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None) or model.enable_gradient_checkpointing
        enable()
    if compiled:
        model.compile(dynamic=False)  # the whole model, as in its documentation
    compute_loss = loss_of(recipe, model, random_batch(recipe, config.batch_size, device))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )

    def step() -> None:
        with autocast(device, config.precision):
            loss = compute_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    turns.repeat(config.batch_size, step)


def peer_model(recipe: TrainRecipe) -> Any:
    """The peer's class of the recipe's model, with random weights."""
    if isinstance(recipe, TrainClipRecipe):
        transformers = importlib.import_module("transformers")
        return transformers.CLIPModel(transformers.CLIPConfig(**recipe.model.to_hugging_face())).train()
    diffusers = importlib.import_module("diffusers")
    if isinstance(recipe, TrainVaeRecipe):
        return getattr(diffusers, recipe.model.hugging_face_class)(**recipe.model.to_mapping()).train()
    if isinstance(recipe, TrainUnetRecipe):
        return diffusers.UNet2DConditionModel(**recipe.model.to_mapping()).train()
    raise TypeError(f"no peer of a {type(recipe).__name__}")


def loss_of(recipe: TrainRecipe, model: Any, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Computes the loss of the model on the batch, each time with other noise."""
    if isinstance(recipe, TrainClipRecipe):
        return lambda: model(batch["ids"], batch["pixels"], return_loss=True).loss
    if isinstance(recipe, TrainVaeRecipe) and recipe.vq is not None:
        return partial(_codebook_loss, model, batch["images"])
    if isinstance(recipe, TrainVaeRecipe):
        return partial(_autoencoder_loss, model, batch["images"], recipe.loss.kl_weight)
    added = {}
    if "pooled" in batch:
        sizes = {"text_embeds": batch["pooled"][:, :-NUM_SIZES], "time_ids": batch["pooled"][:, -NUM_SIZES:]}
        added["added_cond_kwargs"] = sizes
    scheduler = importlib.import_module("diffusers").DDPMScheduler()

    def denoising_loss() -> Tensor:
        noise = torch.randn_like(batch["latents"])
        times = torch.randint_like(batch["timesteps"], scheduler.config.num_train_timesteps)
        noisy = scheduler.add_noise(batch["latents"], noise, times)
        return F.mse_loss(model(noisy, times, batch["tokens"], **added).sample.float(), noise)

    return denoising_loss


def _autoencoder_loss(model: Any, images: Tensor, kl_weight: float) -> Tensor:
    posterior = model.encode(images).latent_dist
    reconstruction = model.decode(posterior.sample()).sample
    kl: Tensor = posterior.kl().mean() / images[0].numel()
    return F.l1_loss(reconstruction.float(), images) + kl_weight * kl


def _codebook_loss(model: Any, images: Tensor) -> Tensor:
    reconstruction, commitment = model(images, return_dict=False)
    loss: Tensor = F.l1_loss(reconstruction.float(), images) + commitment
    return loss


def generate(
    turns: Turns, folder: str, images: int, steps: int, device: str, compiled: bool, prompt: str, guidance: float
) -> None:
    """diffusers' pipeline, loaded, with DDIM; a turn generates all pictures."""
    diffusers = importlib.import_module("diffusers")
    dtype = torch.float32 if device == "cpu" else torch.float16
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=dtype)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if compiled:  # as its documentation does
        pipeline.unet.to(memory_format=torch.channels_last).compile(fullgraph=True, dynamic=False)
        pipeline.vae.to(memory_format=torch.channels_last)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, fullgraph=True, dynamic=False)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "num_images_per_prompt": images}
    turns.repeat(images, lambda: pipeline(prompt, **settings))


def _square(image: Any, size: int) -> Tensor:
    """The central square, resized: uint8 [3, size, size]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), 3)
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def load(turns: Turns, shards: list[str], size: int, batch_size: int, images: int, workers: int) -> None:
    """webdataset's pipeline with PIL: decode, central square, bicubic resize, uint8 batches; a turn is an epoch."""
    webdataset = importlib.import_module("webdataset")
    data = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
    data = data.map_tuple(partial(_square, size=size), str).batched(batch_size)
    # Workers persist between epochs and are forks, so that their start is not measured.
    loader = webdataset.WebLoader(
        data, batch_size=None, num_workers=workers, persistent_workers=True, multiprocessing_context="fork"
    )
    turns.repeat(images, lambda: _exhaust(loader))


def read(turns: Turns, shards: list[str], images: int) -> None:
    """webdataset reads tars without decoding; a turn is an epoch."""
    data = importlib.import_module("webdataset").WebDataset(shards, shardshuffle=False)
    turns.repeat(images, lambda: _exhaust(data))


def _exhaust(data: Any) -> None:
    for _ in data:
        pass
