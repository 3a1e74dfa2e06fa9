"""`ldm train-unet`: a text-conditional denoiser in the latent space of a trained autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.codec import Codec
from ldm_cli.core.models.clip import CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.data.batch import Batch
from ldm_cli.data.cache_manifest import Manifest
from ldm_cli.data.latent_cache import LatentCache
from ldm_cli.errors import RecipeError
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder
from ldm_cli.families.clip_text_encoder import outline_tower
from ldm_cli.families.codec_folder import outline_codec
from ldm_cli.families.stable_diffusion import StableDiffusion
from ldm_cli.families.stable_diffusion_xl import StableDiffusionXL, size_problems
from ldm_cli.formats.model_folder import load_weights
from ldm_cli.formats.pipeline_folder import UNET
from ldm_cli.formats.save_model import save_frozen, save_model
from ldm_cli.formats.scheduler_file import our_settings
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.batch_encoder import BatchEncoder, cache_key
from ldm_cli.stages.support.denoising import Denoising, Encoded, generate_samples
from ldm_cli.stages.support.lora_task import LoRATask, lora_parameters
from ldm_cli.stages.support.model_sizes import (
    Parameters,
    count_parameters,
    model_at,
    outlined,
    trained_parameters,
)
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions, with_precision
from ldm_cli.stages.support.start import build_model, frozen_names, resolve_start, start_uses
from ldm_cli.stages.support.training_run import Workbench, run_training
from ldm_cli.training.checkpoint import link_folder
from ldm_cli.training.task import Task, WeightsByModule


def run(recipe: TrainUnetRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Train the denoiser of `recipe`; the result is a complete folder of Stable Diffusion, or Stable Diffusion XL."""
    recipe = with_precision(resolve_start(with_model_folders(recipe, reporter), reporter.warn), options)
    uses = {"vae": recipe.vae, "text_encoder": recipe.text_encoder} | start_uses(recipe)
    if recipe.text_encoder_2:
        uses["text_encoder_2"] = recipe.text_encoder_2
    build, sizes = partial(_build, recipe), parameters(recipe, [])
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
    expect_known_conditions(recipe)
    vae = model_at("vae", recipe.vae, outline_codec, notes)
    towers = {"text_encoder": model_at("text_encoder", recipe.text_encoder, outline_tower, notes)}
    if recipe.text_encoder_2:
        outline = partial(outline_tower, model_class=CLIPTextModelWithProjection)
        towers["text_encoder_2"] = model_at("text_encoder_2", recipe.text_encoder_2, outline, notes)
    found = [tower.config for tower in towers.values() if tower is not None]
    if vae is not None and len(found) == len(towers):
        fitted_config(recipe, vae, found)
    unet = outlined(lambda: UNet2DConditionModel(recipe.model), recipe)
    used = {"vae": vae, **towers}
    if recipe.lora is not None:
        return lora_parameters(recipe.lora, recipe.train, {UNET: unet, **used}, notes)
    trained, frozen = trained_parameters("unet", unet)
    return trained, frozen | {name: count_parameters(model) for name, model in used.items() if model is not None}


def _build(recipe: TrainUnetRecipe, bench: Workbench) -> Task[Batch]:
    task = DenoiserTask(recipe, bench)
    if recipe.lora is not None:
        return LoRATask(task, recipe, recipe.lora, bench)
    bench.run.share(task.save_unchanged)
    return task


class DenoiserTask:
    """Predict the noise (or v, or x_0) in noised latents, given a condition (Rombach et al. 2022, eq. 2)."""

    def __init__(self, recipe: TrainUnetRecipe, bench: Workbench) -> None:
        self.recipe, self.bench = recipe, bench
        self.encoder = BatchEncoder(recipe, bench.device, bench.run.warn)
        codec, encoder = self.encoder.codec, self.encoder.encoder
        config = fitted_config(recipe, codec, [model.config for model in encoder.models])
        denoiser = build_model(UNet2DConditionModel, config, recipe)
        self._frozen = frozen_names(denoiser)
        if recipe.train.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        settings = our_settings(recipe.diffusion.to_mapping())
        self.family: StableDiffusion | StableDiffusionXL
        if isinstance(encoder, CLIPPairEncoder):
            self.family = StableDiffusionXL(denoiser, codec, encoder, settings)
        else:
            self.family = StableDiffusion(denoiser, codec, encoder, settings)
        self.modules = {"unet": denoiser}
        self.auxiliary: dict[str, torch.nn.Module] = {}
        self.num_files = 1
        empty = self.encoder.condition([""]) if bench.cache is None else self.encoder.cached(bench.cache, "")
        self.denoising = Denoising(self.family, recipe.diffusion, recipe.seed, empty)
        self._held_out: dict[int, Encoded] = {}

    def prepare(self, batch: Batch) -> Batch:
        """With the tokens of its captions, unless it is out of a cache."""
        return self.encoder.prepare(batch)

    def parts(self, batch: Batch, num_parts: int) -> list[Batch]:
        """Samples do not depend on one another."""
        return batch.parts(num_parts)

    def loss(self, part: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean denoising error; each sample has its own level, noise and dropout."""
        return self.denoising.loss(part, *self.encoder(part)), {}

    def _encoded(self, batch: Batch) -> Encoded:
        """A held-out batch; encoded once, unless the encoder is trained."""
        if id(batch) not in self._held_out or self.encoder.adapts_text:
            sent = self.prepare(batch).map(lambda tensor: tensor.to(self.bench.device))
            self._held_out[id(batch)] = (sent, *self.encoder(sent))
        return self._held_out[id(batch)]

    def validate(self) -> dict[str, float]:
        """See `Denoising.validate`."""
        return self.denoising.validate(self.bench.held_out, self._encoded, self.bench.sharing)

    def picture(self, folder: Path | None) -> None:
        """See `generate_samples`."""
        captions = [caption for batch in self.bench.held_out for caption in batch.captions]
        samples, warn = self.recipe.samples, self.bench.run.warn
        generate_samples(self.family, samples, captions, folder, warn, self.bench.sharing)

    def save_unchanged(self, folder: Path) -> None:
        """Write the parts of the model folder that training does not change."""
        self.family.save_companions(folder)
        save_frozen(folder / UNET, self.family.denoiser.state_dict(), self._frozen)

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        """Write the model folder: the trained weights of the denoiser, and links to all else."""
        link_folder(self.bench.run.frozen, folder)
        config = self.family.denoiser.config.to_hugging_face()
        save_model(folder / UNET, weights["unet"], config, frozen=self._frozen)

    def restore(self, folder: Path) -> None:
        """Read the denoiser's weights of `export` back."""
        load_weights(self.family.denoiser, folder / UNET)

    def finalize(self) -> dict[str, float]:
        """Nothing is left to do."""
        return {}


def expect_known_conditions(recipe: TrainUnetRecipe) -> None:
    """Make sure that training has every condition that the denoiser needs.

    Raises:
        RecipeError: naming the fields that ask for others.
    """
    config, known = recipe.model, "addition_embed_type=text_time" if recipe.text_encoder_2 else ""
    fields = [field for field in config.pooled_fields if field != known]
    if config.time_cond_proj_dim is not None:
        fields = [*fields, f"time_cond_proj_dim={config.time_cond_proj_dim}"]
    if fields:
        problems = tuple(f"unet.{field} asks for a condition that train-unet does not have" for field in fields)
        remedy = "set it to null" + ("" if known or config.addition_embed_type is None else ", or give text_encoder_2")
        raise RecipeError("this U-Net cannot be trained", "; ".join(problems), remedy, problems=problems)


def fitted_config(recipe: TrainUnetRecipe, codec: Codec, texts: Sequence[CLIPTextConfig]) -> UNet2DConditionConfig:
    """The denoiser's configuration for latents of this size, if it fits codec and text encoders.

    Args:
        recipe: of the denoiser.
        codec: of its latents.
        texts: configurations of the text encoders, whose states are side by side.

    Raises:
        RecipeError: channels or widths do not fit together.
    """
    config, text_width = recipe.model, sum(text.hidden_size for text in texts)
    problems = size_problems(config, texts[-1].projection_dim) if recipe.text_encoder_2 else []
    if (recipe.clip_skip or 1) > (layers := min(text.num_hidden_layers for text in texts)):
        problems.append(f"clip_skip={recipe.clip_skip}, but a text encoder has {layers} layers")
    channels = codec.channels
    if config.in_channels != channels or config.out_channels != channels:
        problems.append(
            f"unet.in_channels={config.in_channels} and unet.out_channels={config.out_channels}, "
            f"but the latents of '{recipe.vae}' have {channels} channels"
        )
    widths = config.cross_attention_dim
    if any(width != text_width for width in ((widths,) if isinstance(widths, int) else widths)):
        problems.append(
            f"unet.cross_attention_dim={config.cross_attention_dim}, but {_text_encoders(recipe)} {text_width}"
        )
    if recipe.data.image_size % codec.factor:
        problems.append(f"data.image_size={recipe.data.image_size} is no multiple of {codec.factor}")
    buckets = recipe.data.aspect_buckets
    if buckets is not None and buckets.step % codec.factor:
        problems.append(f"data.aspect_buckets.step={buckets.step} is no multiple of {codec.factor}")
    if problems:
        raise RecipeError(
            "the parts do not fit together",
            "; ".join(problems),
            "change the recipe",
            problems=tuple(problems),
        )
    return config.model_copy(update={"sample_size": recipe.data.image_size // codec.factor})


def _text_encoders(recipe: TrainUnetRecipe) -> str:
    """The folders of the text encoders, as the subject of a sentence with its verb."""
    if not recipe.text_encoder_2:
        return f"'{recipe.text_encoder}' gives"
    return f"'{recipe.text_encoder}' and '{recipe.text_encoder_2}' give"
