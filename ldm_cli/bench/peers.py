"""The same work by diffusers, transformers and webdataset. Only this file imports them, and only for comparisons.

Each peer runs as in its own documentation. A faster setting of it (memory order) is a further contender, and the
fastest one counts.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.bench.workload import EncodingStep, Workload, autocast, build_model, random_batch
from ldm_cli.core.diffusion.loss import add_noise, diffusion_loss
from ldm_cli.core.diffusion.process import process_of
from ldm_cli.errors import UnavailableError
from ldm_cli.recipe.schema import TrainClipRecipe, TrainVaeRecipe
from ldm_cli.training.config import TrainConfig


def require(package: str) -> None:
    """Make sure that a peer is installed.

    Raises:
        UnavailableError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(
            f"cannot run against '{package}'", "it is not installed", f"pip install {package}, or leave out --against"
        )


class PeerStep:
    """Forward, backward, gradient clipping and fused AdamW, as the peers' training scripts do them."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], train: TrainConfig, num_units: int) -> None:
        self.model, self.loss, self.train, self.num_units = model, loss, train, num_units
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
            fused=True,
        )
        with torch.no_grad(), autocast(self.device, train.precision):
            self.first_loss = loss().item()

    def step(self) -> None:
        """One optimizer step."""
        with autocast(self.device, self.train.precision):
            loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def facts(self) -> dict[str, Any]:
        """Units per step and the first loss."""
        return {"units": self.num_units, "first_loss": self.first_loss}


def their_step(work: Workload, channels_last: bool = False) -> PeerStep:
    """A peer's training step on the workload's weights and batch."""
    recipe, device = work.recipe, torch.device(work.device)
    model = _their_model(work).to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.train.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None) or model.enable_gradient_checkpointing
        enable()  # type: ignore[operator]
    if recipe.train.compile:
        model.compile(dynamic=False)  # the whole model, as in its documentation
    batch = {name: value.to(device) for name, value in random_batch(work).items()}
    loss: Callable[[], Tensor]
    if isinstance(recipe, TrainClipRecipe):
        loss = lambda: model(batch["ids"], batch["pixels"], return_loss=True).loss  # noqa: E731
    elif isinstance(recipe, TrainVaeRecipe):
        weight = recipe.loss.kl_weight
        loss = lambda: _autoencoder_loss(model, batch["images"], batch["noise"], weight)  # noqa: E731
    else:
        process = process_of(recipe.diffusion)
        x0, noise = batch["latents"], batch["noise"]

        def loss() -> Tensor:
            a, b, time = process.at(batch["u"])
            output = model(add_noise(x0, noise, a, b), time, batch["context"]).sample
            return diffusion_loss(process.prediction, output, x0, noise, a, b).mean()

    return PeerStep(model, loss, recipe.train, recipe.train.batch_size)


def their_encoding(work: Workload, channels_last: bool = False) -> EncodingStep:
    """diffusers' encoder on the workload's images."""
    device = torch.device(work.device)
    model = _their_model(work).to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = random_batch(work)["images"].to(device)
    encode = lambda: model.encode(images).latent_dist.mean  # type: ignore[operator]  # noqa: E731
    return EncodingStep(work, encode, images)


def _autoencoder_loss(model: Any, images: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    posterior = model.encode(images).latent_dist
    reconstruction = model.decode(posterior.mean + posterior.std * noise).sample
    kl: Tensor = posterior.kl().mean() / images[0].numel()
    return F.l1_loss(reconstruction.float(), images) + kl_weight * kl


def _their_model(work: Workload) -> nn.Module:
    """The peer's class of the recipe's model, with our weights."""
    recipe, ours = work.recipe, build_model(work.recipe)
    their: nn.Module
    if isinstance(recipe, TrainClipRecipe):
        transformers = importlib.import_module("transformers")
        their = transformers.CLIPModel(transformers.CLIPConfig(**recipe.model.to_hugging_face()))
    elif isinstance(recipe, TrainVaeRecipe):
        their = importlib.import_module("diffusers").AutoencoderKL(**recipe.model.to_mapping())
    else:
        their = importlib.import_module("diffusers").UNet2DConditionModel(**recipe.model.to_mapping())
    missing, unexpected = their.load_state_dict(ours.state_dict(), strict=False)
    lost = [name for name in missing if not name.endswith("position_ids")] + list(unexpected)
    if lost:
        raise ValueError(f"weights without counterpart in {type(their).__name__}: {lost[:3]}")
    return their.train()


class TheirPictures:
    """diffusers' pipeline, loaded, with DDIM; a step generates all pictures."""

    def __init__(
        self, folder: str, images: int, steps: int, device: str, compiled: bool, prompt: str, guidance: float
    ) -> None:
        diffusers = importlib.import_module("diffusers")
        dtype = torch.float32 if device == "cpu" else torch.float16
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=dtype)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline.to(device)
        if compiled:  # as its documentation does
            pipeline.unet.to(memory_format=torch.channels_last).compile(fullgraph=True, dynamic=False)
            pipeline.vae.to(memory_format=torch.channels_last)
            pipeline.vae.decode = torch.compile(pipeline.vae.decode, fullgraph=True, dynamic=False)
        self.images = images
        self.settings = {"num_inference_steps": steps, "guidance_scale": guidance, "num_images_per_prompt": images}
        self.prompt = prompt

    def step(self) -> None:
        """Generate the pictures."""
        self.pipeline(self.prompt, **self.settings)

    def facts(self) -> dict[str, Any]:
        """Pictures a step."""
        return {"units": self.images}


def script(folder: str, prompt: str, steps: int, guidance: float, target: str) -> str:
    """The shortest diffusers program that generates one picture."""
    return (
        "from diffusers import DDIMScheduler, StableDiffusionPipeline\n"
        f"p = StableDiffusionPipeline.from_pretrained({folder!r}, safety_checker=None)\n"
        "p.scheduler = DDIMScheduler.from_config(p.scheduler.config)\n"
        f"p({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}).images[0].save({target!r})\n"
    )


def _square(image: Any, size: int) -> Tensor:
    """The central square, resized: uint8 [3, size, size]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), 3)
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


class TheirLoader:
    """webdataset's pipeline with PIL: decode, central square, bicubic resize, uint8 batches; 2 workers."""

    def __init__(self, shards: str, size: int, batch_size: int, images: int, workers: int) -> None:
        webdataset = importlib.import_module("webdataset")
        self.images = images

        data = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
        data = data.map_tuple(partial(_square, size=size), str).batched(batch_size)
        # Workers persist between epochs and are forks, so that their start is not measured.
        self.loader = webdataset.WebLoader(
            data, batch_size=None, num_workers=workers, persistent_workers=True, multiprocessing_context="fork"
        )

    def step(self) -> None:
        """One epoch."""
        for _ in self.loader:
            pass

    def facts(self) -> dict[str, Any]:
        """Images an epoch."""
        return {"units": self.images}


class TheirReader:
    """webdataset reads tars without decoding."""

    def __init__(self, shards: str, images: int) -> None:
        self.data = importlib.import_module("webdataset").WebDataset(shards, shardshuffle=False)
        self.images = images

    def step(self) -> None:
        """One epoch."""
        for _ in self.data:
            pass

    def facts(self) -> dict[str, Any]:
        """Samples an epoch."""
        return {"units": self.images}
