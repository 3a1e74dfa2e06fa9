"""The same work by diffusers, transformers and webdataset. Only this file imports them, and only for comparisons.

Each peer runs as in its own documentation. A faster setting of it (memory order) is a further contender, and the
fastest one counts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.bench.race import Runner
from ldm_cli.bench.workload import Workload, build_model, denoising_loss, encoding_step, training_step
from ldm_cli.core.condition import NUM_SIZES
from ldm_cli.recipe.schema import TrainClipRecipe, TrainVaeRecipe


def their_step(work: Workload, channels_last: bool = False) -> Runner:
    """A peer's training step on the workload's weights and batch, with clipping and AdamW as in its scripts."""
    recipe, train = work.recipe, work.recipe.train
    model = _their_model(work, channels_last)
    if train.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None) or model.enable_gradient_checkpointing
        enable()
    if train.compile:
        model.compile(dynamic=False)  # the whole model, as in its documentation
    batch = work.random_batch()
    loss: Callable[[], Tensor]
    if isinstance(recipe, TrainClipRecipe):
        loss = lambda: model(batch["ids"], batch["pixels"], return_loss=True).loss  # noqa: E731
    elif isinstance(recipe, TrainVaeRecipe):
        loss = partial(_autoencoder_loss, model, batch["images"], batch["noise"], recipe.loss.kl_weight)
    else:
        given = {"encoder_hidden_states": batch["context"]} | _added_conditions(batch)
        loss = denoising_loss(recipe, batch, lambda x, time: model(x, time, **given).sample)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=train.lr,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        fused=True,
    )

    def update(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if train.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return training_step(work, loss, update)


def _added_conditions(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Pooled text and sizes of Stable Diffusion XL, if the workload has them."""
    if "pooled" not in batch:
        return {}
    text, sizes = batch["pooled"][:, :-NUM_SIZES], batch["pooled"][:, -NUM_SIZES:]
    return {"added_cond_kwargs": {"text_embeds": text, "time_ids": sizes}}


def their_encoding(work: Workload, channels_last: bool = False) -> Runner:
    """diffusers' encoder on the workload's images."""
    model = _their_model(work, channels_last)
    images = work.random_batch()["images"]
    return encoding_step(work, lambda: model.encode(images).latent_dist.mean)


def _autoencoder_loss(model: Any, images: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    posterior = model.encode(images).latent_dist
    reconstruction = model.decode(posterior.mean + posterior.std * noise).sample
    kl: Tensor = posterior.kl().mean() / images[0].numel()
    return F.l1_loss(reconstruction.float(), images) + kl_weight * kl


def _their_model(work: Workload, channels_last: bool) -> Any:
    """The peer's class of the recipe's model on the device, with our weights."""
    recipe = work.recipe
    if isinstance(recipe, TrainClipRecipe):
        transformers = importlib.import_module("transformers")
        their = transformers.CLIPModel(transformers.CLIPConfig(**recipe.model.to_hugging_face()))
    else:
        kind = "AutoencoderKL" if isinstance(recipe, TrainVaeRecipe) else "UNet2DConditionModel"
        their = getattr(importlib.import_module("diffusers"), kind)(**recipe.model.to_mapping())
    missing, unexpected = their.load_state_dict(build_model(recipe).state_dict(), strict=False)
    lost = [name for name in missing if not name.endswith("position_ids")] + list(unexpected)
    if lost:
        raise ValueError(f"weights without counterpart in {type(their).__name__}: {lost[:3]}")
    order = torch.channels_last if channels_last else torch.preserve_format
    return their.train().to(work.device, memory_format=order)


def their_pictures(
    folder: str, images: int, steps: int, device: str, compiled: bool, prompt: str, guidance: float
) -> Runner:
    """diffusers' pipeline, loaded, with DDIM; a step generates all pictures."""
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
    return Runner(lambda: pipeline(prompt, **settings), images)


def script(folder: str, prompt: str, steps: int, guidance: float) -> str:
    """The shortest diffusers program that generates one picture, into the file that its argument names."""
    return (
        "import sys\n"
        "from diffusers import DDIMScheduler, StableDiffusionPipeline\n"
        f"p = StableDiffusionPipeline.from_pretrained({folder!r}, safety_checker=None)\n"
        "p.scheduler = DDIMScheduler.from_config(p.scheduler.config)\n"
        f"p({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}).images[0].save(sys.argv[1])\n"
    )


def _square(image: Any, size: int) -> Tensor:
    """The central square, resized: uint8 [3, size, size]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), 3)
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def their_loader(shards: list[str], size: int, batch_size: int, images: int, workers: int) -> Runner:
    """webdataset's pipeline with PIL: decode, central square, bicubic resize, uint8 batches; a step is an epoch."""
    webdataset = importlib.import_module("webdataset")
    data = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
    data = data.map_tuple(partial(_square, size=size), str).batched(batch_size)
    # Workers persist between epochs and are forks, so that their start is not measured.
    loader = webdataset.WebLoader(
        data, batch_size=None, num_workers=workers, persistent_workers=True, multiprocessing_context="fork"
    )
    return Runner(lambda: _exhaust(loader), images)


def their_reader(shards: list[str], images: int) -> Runner:
    """webdataset reads tars without decoding; a step is an epoch."""
    data = importlib.import_module("webdataset").WebDataset(shards, shardshuffle=False)
    return Runner(lambda: _exhaust(data), images)


def _exhaust(data: Any) -> None:
    for _ in data:
        pass
