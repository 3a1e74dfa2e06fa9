"""The training of an image prompt adapter in place of a denoiser: the task of a U-Net, which stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_cli import philox
from ldm_cli.core.compiling import compile_regions
from ldm_cli.core.image_prompt import ImagePrompts
from ldm_cli.core.image_prompt_config import HEAD_WIDTH, ImagePromptConfig
from ldm_cli.core.models.clip_config import CLIPVisionConfig
from ldm_cli.core.models.ip_adapter import ImageProjection, IPAdapter, Resampler, cross_attentions
from ldm_cli.core.precision import autocast
from ldm_cli.data.batch import Batch
from ldm_cli.errors import RecipeError
from ldm_cli.families.clip_image_encoder import outline_image_tower
from ldm_cli.families.family import place
from ldm_cli.families.ip_adapter import (
    IMAGE_FEATURES,
    IP_ADAPTER,
    PROMPT_ENCODER,
    ImageFeatures,
    feature_width,
    read_ip_adapter,
    write_ip_adapter,
)
from ldm_cli.formats.pipeline_folder import IMAGE_ENCODER
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.sampling.sample_options import ImageTokens, SampleOptions
from ldm_cli.stages.support.denoising import Encoded
from ldm_cli.stages.support.denoising_task import DenoisingTask
from ldm_cli.stages.support.model_sizes import Parameters, count_parameters, model_at, outlined
from ldm_cli.stages.support.training_run import Workbench
from ldm_cli.training.checkpoint import link_folder
from ldm_cli.training.task import WeightsByModule
from ldm_cli.training.trainer import is_compiled_on

_NAME = "image_prompt"


class ImagePromptTask:
    """Train what makes tokens of pictures, and the keys and values for them (Ye et al. 2023, arXiv:2308.06721, eq. 6).

    The picture of a sample is its own image prompt. `diffusion.caption_dropout` replaces picture and caption by none.

    Args:
        base: its denoiser holds the weights of `start_from`.
    """

    def __init__(self, base: DenoisingTask, recipe: TrainRecipe, config: ImagePromptConfig, bench: Workbench) -> None:
        assert base.encoder.images is not None
        self._base, self._config, self._bench = base, config, bench
        self._features: ImageFeatures = base.encoder.images
        self._unet, train = base.family.denoiser, recipe.train
        self.adapter = new_adapter(config, self._unet, self._features.encoder.model.config)
        self.adapter.begin_as_text(cross_attentions(self._unet))
        self.modules = {_NAME: self.adapter}
        self.auxiliary: dict[str, nn.Module] = {}
        self.num_files = 1
        ImagePrompts(self._unet, [(self.adapter, 1.0)])
        place(bench.device, torch.float32, self._unet, channels_last=train.channels_last)
        if is_compiled_on(bench.device, train, lambda message: None):
            compile_regions(self._unet)
        self._key = philox.key(recipe.seed, "image prompt dropout")
        self._no_text = base.denoising.empty
        with torch.no_grad(), autocast(bench.device, train.precision):
            self._no_image = self._features.absent().float()
        bench.run.share(lambda folder: self._features.encoder.save(folder, IMAGE_ENCODER))

    def prepare(self, batch: Batch) -> Batch:
        """See `base`."""
        return self._base.prepare(batch)

    def parts(self, batch: Batch, num_parts: int) -> Sequence[Batch]:
        """See `base`."""
        return self._base.parts(batch, num_parts)

    def loss(self, part: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `base`, where some samples are without their caption, some without their picture."""
        moments, condition = self._base.encoder(part)
        config, features = self._config, moments[IMAGE_FEATURES]
        share = philox.uniform(self._key, part.epoch, part.position, 1)[:, 0]
        without_text, rest = share < config.text_dropout, share - config.text_dropout
        without_image = (rest >= 0) & (rest < config.image_dropout)
        condition = condition.replaced(without_text, self._no_text)
        features = torch.where(without_image.view(-1, *[1] * (features.ndim - 1)), self._no_image, features)
        tokens = self.adapter(torch.cat([features, self._no_image]))
        self._base.denoising.empty = replace(self._no_text, image_tokens=tokens[-1:])
        return self._base.denoising.loss(part, moments, replace(condition, image_tokens=tokens[:-1]), step)

    def validate(self) -> dict[str, float]:
        """See `Denoising.validate`; each sample has its caption and its picture."""

        def encoded(batch: Batch) -> Encoded:
            sent, moments, condition = self._base.encoded(batch)
            return sent, moments, replace(condition, image_tokens=self.adapter(moments[IMAGE_FEATURES]))

        return self._base.denoising.validate(self._bench.held_out, encoded, self._bench.sharing)

    @torch.no_grad()
    def picture(self, folder: Path | None) -> None:
        """See `generate_samples`: the first held-out picture prompts beside every text."""
        if self._bench.held_out:
            first = self._base.encoded(self._bench.held_out[0])[1][IMAGE_FEATURES][:1]
            tokens = ImageTokens(self.adapter(first), self.adapter(self._no_image))
            self._base.picture(folder, SampleOptions(image_tokens=tokens))

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        """Write the adapter as it is published, and a link to the image encoder, beside which diffusers finds it."""
        link_folder(self._bench.run.frozen, folder)
        write_ip_adapter(folder / IP_ADAPTER, weights[_NAME])

    def restore(self, folder: Path) -> None:
        """Read the adapter of `export` back."""
        self.adapter.load_state_dict(read_ip_adapter(folder / IP_ADAPTER, self._unet).state_dict())

    def finalize(self) -> dict[str, float]:
        """Nothing is left to do."""
        return {}


def new_adapter(config: ImagePromptConfig, unet: nn.Module, vision: CLIPVisionConfig) -> IPAdapter:
    """An adapter with fresh weights, for a U-Net and what an image encoder gives; on the meta device, too.

    Raises:
        RecipeError: the U-Net does not attend to text.
    """
    layers = cross_attentions(unet)
    if not layers:
        raise RecipeError("image_prompt cannot be used", "the U-Net has no attention to text")
    dim, width = next(iter(layers.values())).to_k.in_features, feature_width(vision, config.kind)
    if config.kind == "base":
        return IPAdapter(ImageProjection(width, dim, config.resolved_num_tokens), layers)
    num_heads = config.width // HEAD_WIDTH
    return IPAdapter(Resampler(width, dim, config.resolved_num_tokens, config.width, num_heads), layers)


def image_prompt_parameters(
    config: ImagePromptConfig, models: Mapping[str, nn.Module | None], notes: list[str]
) -> Parameters:
    """The sizes of a recipe with an image prompt adapter; see `model_sizes.py`.

    Args:
        models: all that the recipe uses, by component, the U-Net first; None: it does not exist yet.
        notes: receives a line if the image encoder does not exist yet.
    """
    tower = model_at(PROMPT_ENCODER, config.image_encoder, outline_image_tower, notes)
    unet = next(iter(models.values()))
    trained = {}
    if tower is not None and unet is not None:
        trained[_NAME] = count_parameters(outlined(lambda: new_adapter(config, unet, tower.config)))
    used = {**models, PROMPT_ENCODER: tower}
    return trained, {name: count_parameters(model) for name, model in used.items() if model is not None}
