"""`ldm train-vae`: an image autoencoder from shards."""

from __future__ import annotations

import math
from collections.abc import Collection
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
from ldm_cli.core.models.patch_discriminator import PatchDiscriminator
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.core.vae_loss import PerceptualDistance, VAELoss
from ldm_cli.data.batch import Batch
from ldm_cli.data.loader import Loader
from ldm_cli.data.to_device import sent_to_device
from ldm_cli.errors import DivergedError, RecipeError
from ldm_cli.evaluation.image_quality import psnr
from ldm_cli.families.clip_folder import open_image_processor, outline_clip
from ldm_cli.formats.model_folder import load_model, load_weights
from ldm_cli.formats.save_model import save_frozen, save_model
from ldm_cli.pictures.grid import image_grid
from ldm_cli.pictures.images import save_image
from ldm_cli.recipe.schema import TrainVaeRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.pixels import is_sound
from ldm_cli.stages.support.model_sizes import Parameters, count_parameters, model_at, outlined, trained_parameters
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions, with_precision
from ldm_cli.stages.support.start import build_model, frozen_names, resolve_start, start_uses
from ldm_cli.stages.support.training_run import Workbench, run_training
from ldm_cli.training.checkpoint import link_folder
from ldm_cli.training.shared_work import in_turns
from ldm_cli.training.task import WeightsByModule

_NUM_PICTURES = 8
_NUM_MEASURED = 1024


def run(recipe: TrainVaeRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Train the autoencoder of `recipe`; the result is an AutoencoderKL folder with a measured scale."""
    recipe = with_precision(resolve_start(with_model_folders(recipe, reporter), reporter.warn), options)
    clip, uses, facts = recipe.loss.perceptual_clip, start_uses(recipe), {}
    build, sizes = lambda bench: VAETask(recipe, bench), parameters(recipe, [])
    if clip is not None:
        uses["loss.perceptual_clip"] = clip
        facts["the image processor of loss.perceptual_clip"] = open_image_processor(Path(clip)).model_dump_json()
    return run_training(recipe, options, reporter, build, sizes, uses=uses, facts=facts, with_captions=False)


def parameters(recipe: TrainVaeRecipe, notes: list[str]) -> Parameters:
    """The sizes of `recipe`; see `support/model_sizes.py`.

    Raises:
        RecipeError: a term of the loss cannot be computed with these models.
    """
    vae = outlined(lambda: AutoencoderKL(recipe.model), recipe)
    _expect_last_layer(recipe, frozen_names(vae))
    trained, frozen = trained_parameters("vae", vae)
    loss = recipe.loss
    if loss.adversarial_weight > 0:
        build = lambda: PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers)  # noqa: E731
        trained |= trained_parameters("discriminator", outlined(build))[0]
    if loss.perceptual_clip is not None:
        clip = model_at("loss.perceptual_clip", loss.perceptual_clip, outline_clip, notes)
        if clip is not None:
            _vision_transformer(clip, loss.perceptual_clip)
            open_image_processor(Path(loss.perceptual_clip))
            frozen["perceptual_clip"] = count_parameters(clip.vision_model)
    return trained, frozen


class VAETask:
    """Reconstruct images through a latent; see `core/vae_loss.py` for the terms."""

    def __init__(self, recipe: TrainVaeRecipe, bench: Workbench) -> None:
        self.recipe, self.bench = recipe, bench
        config = recipe.model.model_copy(update={"sample_size": recipe.data.image_size})
        self.vae = build_model(AutoencoderKL, config, recipe)
        self._frozen = frozen_names(self.vae)
        state = self.vae.state_dict()
        bench.run.share(lambda folder: save_frozen(folder, state, self._frozen))
        if recipe.train.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.terms = VAELoss(recipe.loss, _perceptual(recipe.loss.perceptual_clip)).to(bench.device)
        tune_for_cpu(self.terms)
        self.modules = {"vae": self.vae}
        self.num_files = 1
        self.auxiliary = {} if self.terms.discriminator is None else {"discriminator": self.terms.discriminator}
        self._noise_key = philox.key(recipe.seed, "posterior noise")

    def prepare(self, batch: Batch) -> Batch:
        """Nothing is to be done."""
        return batch

    def parts(self, batch: Batch, num_parts: int) -> list[Batch]:
        """Samples do not depend on one another."""
        return batch.parts(num_parts)

    def loss(self, part: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """All terms of `VAELoss`."""
        images = to_signed(part.images, self.bench.device)
        return self.terms(self.vae, images, self._posterior_noise(part), step)  # type: ignore[no-any-return]

    def _posterior_noise(self, batch: Batch) -> Tensor:
        side = self.recipe.data.image_size // self.vae.factor
        shape = (self.vae.channels, side, side)
        return philox.normal(self._noise_key, batch.epoch, batch.position, shape)

    def validate(self) -> dict[str, float]:
        """PSNR and mean absolute error of held-out reconstructions (from the posterior's mean)."""

        def figures(batch: Batch) -> Tensor:
            pixels = batch.images.to(self.bench.device)
            images = to_signed(pixels, self.bench.device)
            again = self.reconstruct(images)
            ratio = psnr(to_bytes(again), pixels)
            return torch.stack([ratio.where(is_sound(again), torch.nan), (again - images).abs().mean(dim=(1, 2, 3))])

        if not self.bench.held_out:
            return {}
        ratios, errors = torch.cat(in_turns(self.bench.held_out, figures, self.bench.sharing), dim=1)
        return {"val_psnr": ratios.mean().item(), "val_l1": errors.mean().item()}

    def reconstruct(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [−1, 1] through the latent and back."""
        return self.vae.decode_z(self.vae.posterior(images).mode())

    def picture(self, folder: Path | None) -> None:
        """`grid.png`: held-out images, each above its reconstruction; by rank 0."""
        if folder is None or not self.bench.held_out:
            return
        images = self.bench.held_out[0].images[:_NUM_PICTURES]
        again = self.reconstruct(to_signed(images, self.bench.device))
        if not bool(is_sound(again).all()):
            self.bench.run.warn("reconstructions of held-out images overflow: there is no picture of them")
            return
        save_image(folder / "grid.png", image_grid([*images, *to_bytes(again).cpu()], columns=len(images)))

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        """Write the AutoencoderKL folder."""
        if self._frozen:
            link_folder(self.bench.run.frozen, folder)
        save_model(folder, weights["vae"], self.vae.config.to_hugging_face(), frozen=self._frozen)

    def restore(self, folder: Path) -> None:
        """Read the weights of `export` back."""
        load_weights(self.vae, folder)

    def finalize(self) -> dict[str, float]:
        """Standardize the latent, channel by channel; measure its mean and deviation, and store them.

        Channels differ in deviation by an order of magnitude, and pipelines of Stable Diffusion 1 and 2 apply
        one scale and no shift. So mean and deviation of each channel go into the 1×1 convolutions around the
        latent, which leaves every reconstruction as it was; the values measured then and stored as
        `scaling_factor` and `shift_factor` are 1 and 0 but for rounding. Where those convolutions are missing or
        frozen, the overall mean and deviation are stored, as in Stable Diffusion 3. Where encoder and latent are
        frozen, all stays as it was.

        Raises:
            DivergedError: mean or deviation is not finite.
        """
        config = self.vae.config
        trained = dict(self.vae.named_parameters()).keys() - self._frozen
        if not any(name.startswith(("encoder.", "quant_conv.")) for name in trained):
            return {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor or 0.0}
        mean, deviation, overall = self._latent_statistics()
        weights = standardized(self.vae.state_dict(), mean, deviation)
        if weights is None or any("quant_conv." in name for name in self._frozen):
            shift = mean.mean().item()
        else:
            self.vae.load_state_dict(weights)
            _, _, overall = self._latent_statistics()
            shift = 0.0
        scale = 1.0 / overall
        if not (math.isfinite(scale) and math.isfinite(shift) and scale > 0.0):
            raise DivergedError("the autoencoder's latents are not finite", f"scale={scale}, shift={shift}")
        self.vae.config = config.model_copy(update={"scaling_factor": scale, "shift_factor": shift})
        return {"scaling_factor": scale, "shift_factor": shift}

    def _latent_statistics(self) -> tuple[Tensor, Tensor, float]:
        """Means [C], deviations [C] and the overall deviation of sampled latents of the first training images."""
        size, known = min(64, self.recipe.train.batch_size), self.bench.shards.num_samples
        loader = Loader(
            self.bench.shards, self.recipe.data, seed=self.recipe.seed, batch_size=size, with_captions=False
        )
        batches = loader.batches(0, max(1, min(_NUM_MEASURED, known or _NUM_MEASURED) // size))
        latents = [
            self.vae.posterior(to_signed(batch.images, self.bench.device)).sample(self._posterior_noise(batch)).double()
            for batch in sent_to_device(batches, self.bench.device)
        ]
        stack = torch.cat(latents)
        return stack.mean(dim=(0, 2, 3)), stack.std(dim=(0, 2, 3)), stack.std().item()


def _perceptual(folder: str | None) -> PerceptualDistance | None:
    if folder is None:
        return None
    tower = _vision_transformer(load_model(CLIPModel, Path(folder)), folder)
    return PerceptualDistance(tower, open_image_processor(Path(folder)))


def _vision_transformer(clip: CLIPModel, folder: str) -> CLIPVisionTransformer:
    """The image tower of a CLIP, if it is a ViT."""
    if not isinstance(clip.vision_model, CLIPVisionTransformer):
        raise RecipeError(
            f"loss.perceptual_clip: '{folder}' cannot be used",
            "it has a ResNet for an image tower",
            "give a CLIP with a ViT",
        )
    return clip.vision_model


def _expect_last_layer(recipe: TrainVaeRecipe, frozen: Collection[str]) -> None:
    if recipe.loss.adversarial_weight > 0 and recipe.loss.adversarial_adaptive and "decoder.conv_out.weight" in frozen:
        raise RecipeError(
            "freeze: decoder.conv_out is frozen",
            "loss.adversarial_adaptive weighs the terms by its gradient",
            "set loss.adversarial_adaptive=false, or thaw it with '!decoder.conv_out.*'",
        )
