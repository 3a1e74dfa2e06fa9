"""`ldm train-vae`: an image autoencoder from shards."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.patch_discriminator import PatchDiscriminator
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.core.vae_loss import PerceptualDistance, VAELoss
from ldm_cli.data.batch import Batch
from ldm_cli.data.loader import Loader
from ldm_cli.data.to_device import sent_to_device
from ldm_cli.errors import RecipeError
from ldm_cli.evaluation.image_quality import psnr
from ldm_cli.families.clip_folder import open_image_processor, outline_clip, vision_transformer
from ldm_cli.families.codec_folder import trained_class
from ldm_cli.formats.model_folder import load_model, load_weights
from ldm_cli.formats.save_model import save_frozen, save_model
from ldm_cli.pictures.grid import image_grid
from ldm_cli.pictures.images import save_image
from ldm_cli.recipe.schema import TrainVaeRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.pixels import is_sound
from ldm_cli.stages.support.discrete_latent import DiscreteLatent
from ldm_cli.stages.support.gaussian_latent import GaussianLatent
from ldm_cli.stages.support.latent import Latent
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
    """Train the autoencoder of `recipe`; the result is its folder, with a measured scale."""
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
    vae = outlined(lambda: trained_class(recipe.model)(recipe.model), recipe)
    _expect_last_layer(recipe, frozen_names(vae))
    trained, frozen = trained_parameters("vae", vae)
    loss = recipe.loss
    if loss.adversarial_weight > 0:
        build = lambda: PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers)  # noqa: E731
        trained |= trained_parameters("discriminator", outlined(build))[0]
    if loss.perceptual_clip is not None:
        clip = model_at("loss.perceptual_clip", loss.perceptual_clip, outline_clip, notes)
        if clip is not None:
            tower = vision_transformer(clip, "loss.perceptual_clip", loss.perceptual_clip)
            open_image_processor(Path(loss.perceptual_clip))
            frozen["perceptual_clip"] = count_parameters(tower)
    return trained, frozen


class _Part(NamedTuple):
    """A part of a batch, and the place of its first sample in the global batch."""

    batch: Batch
    start: int


class VAETask:
    """Reconstruct images through a latent; see `core/vae_loss.py` for the terms."""

    def __init__(self, recipe: TrainVaeRecipe, bench: Workbench) -> None:
        self.recipe, self.bench = recipe, bench
        config = recipe.model.model_copy(update={"sample_size": recipe.data.image_size})
        self.vae = build_model(trained_class(config), config, recipe)
        self._frozen = frozen_names(self.vae)
        state = self.vae.state_dict()
        bench.run.share(lambda folder: save_frozen(folder, state, self._frozen))
        if recipe.train.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.terms = VAELoss(recipe.loss, _perceptual(recipe.loss.perceptual_clip)).to(bench.device)
        tune_for_cpu(self.terms)
        self.modules = {"vae": self.vae}
        self.num_files = 1
        self.latent = _latent(self.vae, recipe)
        self.auxiliary = dict(self.latent.auxiliary)
        if self.terms.discriminator is not None:
            self.auxiliary["discriminator"] = self.terms.discriminator

    def prepare(self, batch: Batch) -> Batch:
        """Nothing is to be done."""
        return batch

    def parts(self, batch: Batch, num_parts: int) -> list[_Part]:
        """Samples do not depend on one another."""
        start = self.bench.ranks.rank * len(batch)
        return [_Part(part, start + i * len(part)) for i, part in enumerate(batch.parts(num_parts))]

    def loss(self, part: _Part, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """All terms of `VAELoss`, and the figures of the latent."""
        images = to_signed(part.batch.images, self.bench.device)
        reconstruction, latent = self.latent.through(images, part.batch, part.start, step)
        last_layer = self.vae.decoder.conv_out.weight
        loss, terms = self.terms(images, reconstruction, latent.weighted, last_layer, step)
        return loss, {**terms, **latent.figures}

    def validate(self) -> dict[str, float]:
        """PSNR and mean absolute error of held-out reconstructions, and how much of a codebook is used."""

        def rows(batch: Batch) -> Tensor:
            pixels = batch.images.to(self.bench.device)
            images = to_signed(pixels, self.bench.device)
            again = self.vae.reconstruct(images)
            ratio = psnr(to_bytes(again), pixels).where(is_sound(again), torch.nan)
            error = (again - images).abs().mean(dim=(1, 2, 3))
            return torch.cat([torch.stack([ratio, error]), self.latent.held_out_rows(images)])

        if not self.bench.held_out:
            return {}
        found = torch.cat(in_turns(self.bench.held_out, rows, self.bench.sharing), dim=1)
        means = {"val_psnr": found[0].mean().item(), "val_l1": found[1].mean().item()}
        return means | self.latent.held_out_figures(found[2:])

    def picture(self, folder: Path | None) -> None:
        """`grid.png`: held-out images, each above its reconstruction; by rank 0."""
        if folder is None or not self.bench.held_out:
            return
        images = self.bench.held_out[0].images[:_NUM_PICTURES]
        again = self.vae.reconstruct(to_signed(images, self.bench.device))
        if not bool(is_sound(again).all()):
            self.bench.run.warn("reconstructions of held-out images overflow: there is no picture of them")
            return
        save_image(folder / "grid.png", image_grid([*images, *to_bytes(again).cpu()], columns=len(images)))

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        """Write the folder of the autoencoder."""
        if self._frozen:
            link_folder(self.bench.run.frozen, folder)
        save_model(folder, weights["vae"], self.vae.config.to_hugging_face(), frozen=self._frozen)

    def restore(self, folder: Path) -> None:
        """Read the weights of `export` back."""
        load_weights(self.vae, folder)

    def finalize(self) -> dict[str, float]:
        """Measure the latent as `Latent.finalize` says; where encoder and latent are frozen, all stays as it was."""
        trained = dict(self.vae.named_parameters()).keys() - self._frozen
        if not any(name.startswith(("encoder.", "quant_conv.")) for name in trained):
            factors = ("scaling_factor", "shift_factor")
            return {name: getattr(self.vae.config, name) or 0.0 for name in factors if hasattr(self.vae.config, name)}
        return self.latent.finalize(self._first_training_images, self._frozen)

    def _first_training_images(self) -> Iterator[Batch]:
        size, known = min(64, self.recipe.train.batch_size), self.bench.shards.num_samples
        loader = Loader(
            self.bench.shards, self.recipe.data, seed=self.recipe.seed, batch_size=size, with_captions=False
        )
        batches = loader.batches(0, max(1, min(_NUM_MEASURED, known or _NUM_MEASURED) // size))
        return sent_to_device(batches, self.bench.device)


def _latent(vae: AutoencoderKL | VQModel, recipe: TrainVaeRecipe) -> Latent:
    if isinstance(vae, AutoencoderKL):
        return GaussianLatent(vae, recipe.loss.kl_weight, recipe.seed)
    return DiscreteLatent(
        vae, recipe.codebook, recipe.seed, recipe.train.batch_size, is_trained=recipe.start_from is not None
    )


def _perceptual(folder: str | None) -> PerceptualDistance | None:
    if folder is None:
        return None
    tower = vision_transformer(load_model(CLIPModel, Path(folder)), "loss.perceptual_clip", folder)
    return PerceptualDistance(tower, open_image_processor(Path(folder)))


def _expect_last_layer(recipe: TrainVaeRecipe, frozen: Collection[str]) -> None:
    if recipe.loss.adversarial_weight > 0 and recipe.loss.adversarial_adaptive and "decoder.conv_out.weight" in frozen:
        raise RecipeError(
            "freeze: decoder.conv_out is frozen",
            "loss.adversarial_adaptive weighs the terms by its gradient",
            "set loss.adversarial_adaptive=false, or thaw it with '!decoder.conv_out.*'",
        )
