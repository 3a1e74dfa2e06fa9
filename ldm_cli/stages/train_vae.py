"""`ldm train-vae`: an image autoencoder from shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_vision import CLIPVisionTransformer
from ldm_cli.core.models.latent_space import standardized
from ldm_cli.core.vae_loss import VAELoss
from ldm_cli.data.batch import Batch
from ldm_cli.data.loader import Loader
from ldm_cli.errors import RecipeError
from ldm_cli.evaluation.image_quality import psnr
from ldm_cli.formats.model_folder import load_model, load_weights, save_model
from ldm_cli.pictures.grid import image_grid
from ldm_cli.pictures.images import save_image
from ldm_cli.recipe.schema import TrainVaeRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.stages.support.training_run import Workbench, run_training, split
from ldm_cli.training.task import Losses, in_parts

_NUM_PICTURES = 8
_NUM_MEASURED = 1024


def run(recipe: TrainVaeRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Train the autoencoder of `recipe`; the result is an AutoencoderKL folder with a measured scale."""
    clip = recipe.loss.perceptual_clip
    uses = {} if clip is None else {"loss.perceptual_clip": clip}
    return run_training(recipe, options, reporter, lambda bench: VAETask(recipe, bench), uses=uses, with_captions=False)


class VAETask:
    """Reconstruct images through a latent; see `core/vae_loss.py` for the terms."""

    def __init__(self, recipe: TrainVaeRecipe, bench: Workbench) -> None:
        self.recipe, self.bench = recipe, bench
        config = recipe.vae.model_copy(update={"sample_size": recipe.data.image_size})
        self.vae = AutoencoderKL(config)
        if recipe.train.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.loss = VAELoss(recipe.loss, _perceptual_tower(recipe.loss.perceptual_clip)).to(bench.device)
        tune_for_cpu(self.loss)
        self.modules = {"vae": self.vae}
        self.auxiliary = {} if self.loss.discriminator is None else {"discriminator": self.loss.discriminator}
        self._noise_key = philox.key(recipe.seed, "posterior noise")

    def losses(self, batch: Batch, num_parts: int, step: int) -> Losses:
        """The autoencoder's loss on equal parts of the batch."""

        def loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            images = to_signed(part.images, self.bench.device)
            noise = self._posterior_noise(part)
            return self.loss(self.vae, images, noise, step)  # type: ignore[no-any-return]

        return in_parts(loss, split(batch, num_parts))

    def _posterior_noise(self, batch: Batch) -> Tensor:
        side = self.recipe.data.image_size // self.vae.downscale_factor
        shape = (self.vae.config.latent_channels, side, side)
        return philox.normal(self._noise_key, batch.epoch, batch.position, shape).to(self.bench.device)

    def validate(self) -> dict[str, float]:
        """PSNR and mean absolute error of held-out reconstructions (from the posterior's mean)."""
        ratios, errors = [], []
        for batch in self.bench.held_out:
            images = to_signed(batch.images, self.bench.device)
            again = self.reconstruct(images)
            errors.append((again - images).abs().mean(dim=(1, 2, 3)))
            ratios.append(psnr(to_bytes(again), batch.images.to(self.bench.device)))
        if not ratios:
            return {}
        return {"val_psnr": torch.cat(ratios).mean().item(), "val_l1": torch.cat(errors).mean().item()}

    def reconstruct(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [−1, 1] through the latent and back."""
        return self.vae.decode(self.vae.encode(images).mode())

    def picture(self, folder: Path) -> None:
        """`grid.png`: held-out images, each above its reconstruction."""
        if not self.bench.held_out:
            return
        images = self.bench.held_out[0].images[:_NUM_PICTURES]
        again = to_bytes(self.reconstruct(to_signed(images, self.bench.device))).cpu()
        save_image(folder / "grid.png", image_grid([*images, *again], columns=len(images)))

    def export(self, folder: Path) -> None:
        """Write the AutoencoderKL folder."""
        save_model(folder, self.vae.state_dict(), self.vae.config.to_hugging_face())

    def restore(self, folder: Path) -> None:
        """Read the weights of `export` back."""
        load_weights(self.vae, folder)

    def finalize(self) -> dict[str, float]:
        """Standardize the latent, channel by channel; measure its mean and deviation, and store them.

        Channels differ in deviation by an order of magnitude, and pipelines of Stable Diffusion 1 and 2 apply
        one scale and no shift. So mean and deviation of each channel go into the 1×1 convolutions around the
        latent, which leaves every reconstruction as it was; what is measured then and stored as
        `scaling_factor` and `shift_factor` is 1 and 0 but for rounding. Without those convolutions the overall
        mean and deviation are stored, as in Stable Diffusion 3.
        """
        mean, deviation, _ = self._latent_statistics()
        weights = standardized(self.vae.state_dict(), mean, deviation)
        if weights is not None:
            self.vae.load_state_dict(weights)
            mean, _, overall = self._latent_statistics()
            shift = 0.0
        else:
            mean, _, overall = self._latent_statistics()
            shift = mean.mean().item()
        scale = 1.0 / overall
        self.vae.config = self.vae.config.model_copy(update={"scaling_factor": scale, "shift_factor": shift})
        return {"scaling_factor": scale, "shift_factor": shift}

    def _latent_statistics(self) -> tuple[Tensor, Tensor, float]:
        """Means [C], deviations [C] and the overall deviation of sampled latents of the first training images."""
        size, known = min(64, self.recipe.train.batch_size), self.bench.shards.num_samples
        loader = Loader(
            self.bench.shards, self.recipe.data, seed=self.recipe.seed, batch_size=size, with_captions=False
        )
        latents = [
            self.vae.encode(to_signed(batch.images, self.bench.device)).sample(self._posterior_noise(batch)).double()
            for batch in loader.batches(0, max(1, min(_NUM_MEASURED, known or _NUM_MEASURED) // size))
        ]
        stack = torch.cat(latents)
        return stack.mean(dim=(0, 2, 3)), stack.std(dim=(0, 2, 3)), stack.std().item()


def to_signed(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] → float32 in [−1, 1] on the device."""
    return images.to(device, non_blocking=True).float().div_(127.5).sub_(1.0)


def to_bytes(images: Tensor) -> Tensor:
    """Float [B, 3, H, W] in [−1, 1] → uint8, rounded."""
    return images.float().add(1.0).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


def _perceptual_tower(folder: str | None) -> CLIPVisionTransformer | None:
    if folder is None:
        return None
    tower = load_model(CLIPModel, Path(folder)).vision_model
    if not isinstance(tower, CLIPVisionTransformer):
        raise RecipeError(
            f"loss.perceptual_clip: '{folder}' cannot be used",
            "it has a ResNet for an image tower",
            "give a CLIP with a ViT",
        )
    return tower
