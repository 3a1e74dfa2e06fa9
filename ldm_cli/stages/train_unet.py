"""`ldm train-unet`: a text-conditional denoiser in the latent space of a trained autoencoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_cli.core.codec import PixelCodec
from ldm_cli.core.models.clip_text import CLIPTextModel
from ldm_cli.core.models.sd3_transformer_2d import SD3Transformer2DModel
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.data.batch import Batch
from ldm_cli.data.cache_manifest import Manifest
from ldm_cli.data.latent_cache import LatentCache
from ldm_cli.errors import RecipeError
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder
from ldm_cli.families.clip_text_encoder import save_tower
from ldm_cli.families.codec_folder import outline_codec
from ldm_cli.families.family import Family
from ldm_cli.families.pixel_diffusion import PixelDiffusion, pixel_settings
from ldm_cli.families.prior import EMBEDDINGS
from ldm_cli.families.stable_diffusion import StableDiffusion
from ldm_cli.families.stable_diffusion_3 import StableDiffusion3
from ldm_cli.families.stable_diffusion_xl import StableDiffusionXL
from ldm_cli.formats.model_folder import ModelClass, load_weights
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TRANSFORMER, UNET
from ldm_cli.formats.scheduler_file import our_settings
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.sample_options import PLAIN, SampleOptions
from ldm_cli.stages.support.batch_encoder import BatchEncoder, cache_key
from ldm_cli.stages.support.denoising import generate_samples
from ldm_cli.stages.support.denoising_task import DenoisingTask
from ldm_cli.stages.support.fitting import expect_known_conditions, fitted_config
from ldm_cli.stages.support.image_condition import ImageCondition, outline_image_encoder
from ldm_cli.stages.support.image_prompt_task import ImagePromptTask, image_prompt_parameters
from ldm_cli.stages.support.lora_task import LoRATask, lora_parameters
from ldm_cli.stages.support.low_resolution import open_low_resolution, upscaler
from ldm_cli.stages.support.model_sizes import Parameters, count_parameters, model_at, outlined, trained_parameters
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions, with_precision
from ldm_cli.stages.support.patch_training import open_patch_training, patch_parameters
from ldm_cli.stages.support.pixel_training import prompts_of_batch
from ldm_cli.stages.support.start import build_model, resolve_start, start_uses
from ldm_cli.stages.support.text_encoders import outline_text_encoders, text_folders
from ldm_cli.stages.support.training_run import Workbench, run_training
from ldm_cli.training.task import Task, WeightsByModule


def run(recipe: TrainUnetRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Train the denoiser of `recipe`; the result is a complete folder of Stable Diffusion, XL or 3."""
    recipe = with_precision(resolve_start(with_model_folders(recipe, reporter), reporter.warn), options)
    codec = {} if recipe.is_of_pixels else {"vae": recipe.vae}
    uses = {**codec, **text_folders(recipe)} | start_uses(recipe)
    if recipe.patches.clip is not None:
        uses["patches.clip"] = recipe.patches.clip
    if recipe.image_embedding is not None:
        uses["image_embedding.image_encoder"] = recipe.image_embedding.image_encoder
    if recipe.image_prompt is not None:
        uses["image_prompt.image_encoder"] = recipe.image_prompt.image_encoder
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
    vae = None if recipe.is_of_pixels else model_at("vae", recipe.vae, outline_codec, notes)
    codec = PixelCodec() if recipe.is_of_pixels else vae
    texts, images = outline_text_encoders(recipe, notes), outline_image_encoder(recipe, notes)
    found = [text for text in texts.values() if text is not None]
    if codec is not None and len(found) == len(texts):
        fitted_config(recipe, codec, found)
    if dropout := recipe.diffusion.encoder_dropout:
        share = 1 - (1 - recipe.diffusion.caption_dropout) * (1 - dropout ** len(texts))
        notes.append(f"diffusion: {100 * share:.3g} % of captions become the empty one, of {len(texts)} encoders")
    denoiser = outlined(lambda: _CLASSES[recipe.component](recipe.model), recipe)
    used = {"vae": vae, **texts, **images}
    if recipe.lora is not None:
        return lora_parameters(recipe.lora, recipe.train, {recipe.component: denoiser, **used}, notes)
    if recipe.image_prompt is not None:
        return image_prompt_parameters(recipe.image_prompt, {recipe.component: denoiser, **used}, notes)
    trained, frozen = trained_parameters(recipe.component, denoiser)
    if recipe.train_text_encoder and (tower := used.pop(TEXT_ENCODER)) is not None:
        trained[TEXT_ENCODER] = count_parameters(_clip(tower))
    further, compared = patch_parameters(recipe, notes)
    frozen |= {name: count_parameters(model) for name, model in used.items() if model is not None}
    return trained | further, frozen | compared


def _build(recipe: TrainUnetRecipe, bench: Workbench) -> Task[Batch]:
    task = DenoiserTask(recipe, bench)
    if recipe.lora is not None:
        return LoRATask(task, recipe, recipe.lora, bench)
    if recipe.image_prompt is not None:
        return ImagePromptTask(task, recipe, recipe.image_prompt, bench)
    bench.run.share(task.save_unchanged)
    return task


def _clip(text_encoder: nn.Module) -> CLIPTextModel:
    """The text encoder, which is to be trained.

    Raises:
        RecipeError: it is no CLIP.
    """
    if isinstance(text_encoder, CLIPTextModel):
        return text_encoder
    raise RecipeError("train_text_encoder is for a CLIP", f"text_encoder is a {type(text_encoder).__name__}")


_CLASSES: dict[str, ModelClass[Any]] = {UNET: UNet2DConditionModel, TRANSFORMER: SD3Transformer2DModel}


def _family(recipe: TrainUnetRecipe, denoiser: Any, codec: Any, encoder: Any) -> Family:
    """The family to which a codec and an encoder of these kinds belong."""
    diffusion = recipe.diffusion
    if recipe.low_resolution is not None:
        return upscaler(denoiser, codec, encoder, diffusion, recipe.low_resolution)
    if isinstance(codec, PixelCodec):
        return PixelDiffusion(denoiser, codec, encoder, pixel_settings(diffusion.to_mapping()))
    settings = our_settings(diffusion.to_mapping())
    if recipe.component == TRANSFORMER:
        return StableDiffusion3(denoiser, codec, encoder, settings)
    if isinstance(encoder, CLIPPairEncoder):
        return StableDiffusionXL(denoiser, codec, encoder, settings)
    return StableDiffusion(denoiser, codec, encoder, settings)


class DenoiserTask(DenoisingTask):
    """Predict the noise (or v, or x_0) in noised latents, given a condition (Rombach et al. 2022, eq. 2)."""

    def __init__(self, recipe: TrainUnetRecipe, bench: Workbench) -> None:
        self.recipe = recipe
        encoder = BatchEncoder(recipe, bench.device, bench.run.warn)
        config = fitted_config(recipe, encoder.codec, encoder.encoder.models)
        denoiser = build_model(_CLASSES[recipe.component], config, recipe)
        family = _family(recipe, denoiser, encoder.codec, encoder.encoder)
        self.image_condition: ImageCondition | None = None
        if recipe.image_embedding is not None:
            self.image_condition = ImageCondition(recipe.image_embedding, recipe, bench, encoder)
            family = self.image_condition.family(family)
        self.low = open_low_resolution(recipe, family)
        patches = open_patch_training(recipe, bench.device)
        encoder.trains_text = recipe.train_text_encoder
        super().__init__(recipe, bench, encoder, family, patches, self.image_condition or self.low)
        if patches is not None and patches.alignment is not None:
            self.auxiliary["projection"] = patches.alignment
        if recipe.train_text_encoder:
            tower = _clip(encoder.encoder.models[0]).requires_grad_(True)
            if recipe.train.gradient_checkpointing:
                tower.enable_gradient_checkpointing()
            self.modules[TEXT_ENCODER] = tower

    def loss(self, part: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """As of every denoiser; a dropped caption trains the text encoder, too."""
        if self.recipe.train_text_encoder:
            self.encode_empty()
        return super().loss(part, step)

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        """As of every denoiser; with the text encoder if it is trained."""
        super().export(folder, weights)
        if TEXT_ENCODER in weights:
            save_tower(folder / TEXT_ENCODER, _clip(self.modules[TEXT_ENCODER]), weights[TEXT_ENCODER])

    def restore(self, folder: Path) -> None:
        """Read the weights of `export` back."""
        super().restore(folder)
        if TEXT_ENCODER in self.modules:
            load_weights(self.modules[TEXT_ENCODER], folder / TEXT_ENCODER)

    def picture(self, folder: Path | None, options: SampleOptions = PLAIN) -> None:
        """See `generate_samples`."""
        captions = [caption for batch in self.bench.held_out for caption in prompts_of_batch(batch, self.recipe)]
        samples, warn = self.recipe.samples, self.bench.run.warn
        embeddings = None
        if self.image_condition is not None and captions:
            embeddings = torch.cat([self.encoded(batch)[1][EMBEDDINGS] for batch in self.bench.held_out])
        small = () if self.low is None else self.low.pictures(self.bench.held_out, samples.num_prompts)
        generate_samples(self.family, samples, captions, folder, warn, self.bench.sharing, embeddings, options, small)
