"""`ldm train-unet`: a text-conditional denoiser in the latent space of a trained autoencoder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.codec import Codec
from ldm_cli.core.condition import Condition
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.data.batch import Batch
from ldm_cli.data.cache_manifest import Manifest
from ldm_cli.data.latent_cache import LatentCache
from ldm_cli.errors import RecipeError
from ldm_cli.families.clip_text_encoder import text_config_of
from ldm_cli.families.stable_diffusion import StableDiffusion
from ldm_cli.formats.model_folder import load_weights
from ldm_cli.formats.pipeline_folder import UNET
from ldm_cli.formats.save_model import save_frozen, save_model
from ldm_cli.formats.scheduler_file import our_settings
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.batch_encoder import BatchEncoder, cache_key
from ldm_cli.stages.support.denoising import Denoising, generate_samples
from ldm_cli.stages.support.model_sizes import (
    Parameters,
    count_parameters,
    model_at,
    outlined,
    trained_parameters,
)
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.stages.support.start import build_model, frozen_names, resolve_start, start_uses
from ldm_cli.stages.support.training_run import Workbench, run_training
from ldm_cli.training.checkpoint import link_folder


def run(recipe: TrainUnetRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Train the denoiser of `recipe`; the result is a complete Stable Diffusion folder."""
    recipe = resolve_start(with_model_folders(recipe, reporter), reporter.warn)
    uses = {"vae": recipe.vae, "text_encoder": recipe.text_encoder} | start_uses(recipe)
    build, sizes = lambda bench: DenoiserTask(recipe, bench), parameters(recipe, [])
    if recipe.cache is None:
        return run_training(recipe, options, reporter, build, sizes, uses=uses)
    folder = Path(recipe.cache)
    open_cache = lambda shards: LatentCache(folder, shards, cache_key(recipe), reporter)  # noqa: E731
    manifest = Manifest.read(folder)
    # In fp32 a cache changes nothing; rounded, it makes another run.
    rounded = {"cache": manifest.key.dtype} if manifest and manifest.key.dtype != "fp32" else {}
    return run_training(recipe, options, reporter, build, sizes, uses=uses, facts=rounded, open_cache=open_cache)


def parameters(recipe: TrainUnetRecipe, notes: list[str]) -> Parameters:
    """The sizes of `recipe`; see `support/model_sizes.py`.

    Raises:
        RecipeError: the models do not fit together.
    """
    expect_known_conditions(recipe.model)
    vae = model_at("vae", recipe.vae, AutoencoderKL, notes)
    text_encoder = model_at("text_encoder", recipe.text_encoder, CLIPTextModel, notes, text_config_of, allow_extra=True)
    if vae is not None and text_encoder is not None:
        fitted_config(recipe, vae, text_encoder.config.hidden_size)
    trained, frozen = trained_parameters("unet", outlined(lambda: UNet2DConditionModel(recipe.model), recipe))
    found = {"vae": vae, "text_encoder": text_encoder}
    return trained, frozen | {n: count_parameters(model) for n, model in found.items() if model is not None}


class DenoiserTask:
    """Predict the noise (or v, or x_0) in noised latents, given a condition (Rombach et al. 2022, eq. 2)."""

    def __init__(self, recipe: TrainUnetRecipe, bench: Workbench) -> None:
        self.recipe, self.bench = recipe, bench
        self.encoder = BatchEncoder(recipe, bench.device, bench.run.warn)
        codec, encoder = self.encoder.codec, self.encoder.encoder
        config = fitted_config(recipe, codec, encoder.model.config.hidden_size)
        denoiser = build_model(UNet2DConditionModel, config, recipe)
        self._frozen = frozen_names(denoiser)
        if recipe.train.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        self.family = StableDiffusion(denoiser, codec, encoder, our_settings(recipe.diffusion.to_mapping()))
        self.modules = {"unet": denoiser}
        self.auxiliary: dict[str, torch.nn.Module] = {}
        empty = self.encoder.condition([""]) if bench.cache is None else self.encoder.cached(bench.cache, "")
        self.denoising = Denoising(self.family, recipe.diffusion, recipe.seed, empty)
        bench.run.share(self._save_unchanged)

    def parts(self, batch: Batch, num_parts: int) -> list[Batch]:
        """Samples do not depend on one another."""
        return batch.parts(num_parts)

    def loss(self, part: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean denoising error; each sample has its own level, noise and dropout."""
        return self.denoising.loss(part, *self.encoder(part)), {}

    @cached_property
    def _held_out(self) -> list[tuple[Batch, dict[str, Tensor], Condition]]:
        """The held-out batches; encoded once, for codec and encoder do not change."""
        return [(batch, *self.encoder(batch)) for batch in self.bench.held_out]

    def validate(self) -> dict[str, float]:
        """See `Denoising.validate`."""
        return self.denoising.validate(self._held_out)

    def picture(self, folder: Path) -> None:
        """See `generate_samples`."""
        captions = [caption for batch in self.bench.held_out for caption in batch.captions]
        generate_samples(self.family, self.recipe.samples, captions, folder, self.bench.run.warn)

    def _save_unchanged(self, folder: Path) -> None:
        """Write the parts of the model folder that training does not change."""
        self.family.save_companions(folder)
        save_frozen(folder / UNET, self.family.denoiser.state_dict(), self._frozen)

    def export(self, folder: Path) -> None:
        """Write the model folder: the trained weights of the denoiser, and links to all else."""
        link_folder(self.bench.run.frozen, folder)
        denoiser = self.family.denoiser
        save_model(folder / UNET, denoiser.state_dict(), denoiser.config.to_hugging_face(), frozen=self._frozen)

    def restore(self, folder: Path) -> None:
        """Read the denoiser's weights of `export` back."""
        load_weights(self.family.denoiser, folder / UNET)

    def finalize(self) -> dict[str, float]:
        """Nothing is left to do."""
        return {}


def expect_known_conditions(config: UNet2DConditionConfig) -> None:
    """Make sure that training has every condition that the denoiser needs.

    Raises:
        RecipeError: naming the fields that ask for others.
    """
    fields = config.pooled_fields
    if config.time_cond_proj_dim is not None:
        fields = [*fields, f"time_cond_proj_dim={config.time_cond_proj_dim}"]
    if fields:
        problems = tuple(f"unet.{field} asks for a condition that train-unet does not have" for field in fields)
        raise RecipeError("this U-Net cannot be trained", "; ".join(problems), "set it to null", problems=problems)


def fitted_config(recipe: TrainUnetRecipe, codec: Codec, text_width: int) -> UNet2DConditionConfig:
    """The denoiser's configuration for latents of this size, if it fits codec and text encoder.

    Raises:
        RecipeError: channels or widths do not fit together.
    """
    config = recipe.model
    problems = []
    channels = codec.channels
    if config.in_channels != channels or config.out_channels != channels:
        problems.append(
            f"unet.in_channels={config.in_channels} and unet.out_channels={config.out_channels}, "
            f"but the latents of '{recipe.vae}' have {channels} channels"
        )
    widths = config.cross_attention_dim
    if any(width != text_width for width in ((widths,) if isinstance(widths, int) else widths)):
        problems.append(
            f"unet.cross_attention_dim={config.cross_attention_dim}, but '{recipe.text_encoder}' gives {text_width}"
        )
    if recipe.data.image_size % codec.factor:
        problems.append(f"data.image_size={recipe.data.image_size} is no multiple of {codec.factor}")
    if problems:
        raise RecipeError(
            "the parts do not fit together",
            "; ".join(problems),
            "change the recipe",
            problems=tuple(problems),
        )
    return config.model_copy(update={"sample_size": recipe.data.image_size // codec.factor})
