"""`ldm train-prior`: unCLIP's prior, which predicts CLIP's embedding of a picture from its caption."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ldm_cli import philox
from ldm_cli.core.diffusion.loss import add_noise
from ldm_cli.core.models.image_normalizer import ImageNormalizer
from ldm_cli.core.models.prior_transformer import PriorTransformer
from ldm_cli.data.batch import Batch
from ldm_cli.data.cache_manifest import Manifest
from ldm_cli.data.latent_cache import LatentCache
from ldm_cli.errors import RecipeError
from ldm_cli.families.clip_folder import outline_clip
from ldm_cli.families.prior import EMBEDDINGS, EmbeddingCodec, Prior, size_problems
from ldm_cli.formats.clipping_scheduler import ClippingScheduler
from ldm_cli.formats.pipeline_folder import IMAGE_NORMALIZER, PRIOR
from ldm_cli.formats.save_model import save_model
from ldm_cli.recipe.prior_recipe import TrainPriorRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.prior_sampler import sampled_embeddings
from ldm_cli.stages.support.batch_encoder import cache_key
from ldm_cli.stages.support.denoising import NUM_NOISE_LEVELS
from ldm_cli.stages.support.denoising_task import DenoisingTask
from ldm_cli.stages.support.embedding_statistics import measured_normalizer
from ldm_cli.stages.support.model_sizes import Parameters, count_parameters, model_at, outlined, trained_parameters
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions, with_precision
from ldm_cli.stages.support.prior_encoder import PriorBatchEncoder
from ldm_cli.stages.support.start import build_model, resolve_start, start_uses
from ldm_cli.stages.support.training_run import Workbench, run_training
from ldm_cli.training.shared_work import in_turns

_MEASURED = frozenset({"clip_mean", "clip_std"})
_COSINES = ("val_cosine", "val_text_cosine", "val_random_cosine")


def run(recipe: TrainPriorRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Train the prior of `recipe`; the result is a folder with its CLIP, which `ldm convert --prior` takes."""
    recipe = with_precision(resolve_start(with_model_folders(recipe, reporter), reporter.warn), options)
    uses = {"clip": recipe.clip} | start_uses(recipe)
    build, sizes = partial(PriorTask, recipe), parameters(recipe, [])
    if recipe.cache is None:
        return run_training(recipe, options, reporter, build, sizes, uses=uses)
    folder = Path(recipe.cache)
    manifest = Manifest.read(folder)
    rounded = {"cache": manifest.key.dtype} if manifest and manifest.key.dtype != "fp32" else {}

    def open_cache(shards: Any) -> LatentCache:
        return LatentCache(folder, shards, cache_key(recipe), reporter)

    return run_training(recipe, options, reporter, build, sizes, uses=uses, facts=rounded, open_cache=open_cache)


def parameters(recipe: TrainPriorRecipe, notes: list[str]) -> Parameters:
    """The sizes of `recipe`; see `support/model_sizes.py`.

    Raises:
        RecipeError: prior and CLIP do not fit together.
    """
    clip, frozen = model_at("clip", recipe.clip, outline_clip, notes), {}
    if clip is not None:
        text = clip.config.text_config.model_copy(update={"projection_dim": clip.config.projection_dim})
        if found := size_problems(recipe.model, text, clip.config.projection_dim):
            raise RecipeError("the parts do not fit together", "; ".join(found), "change prior", problems=tuple(found))
        frozen = {"clip": count_parameters(clip)}
    trained, left = trained_parameters(PRIOR, outlined(lambda: PriorTransformer(recipe.model), recipe))
    return trained, left | frozen


class PriorTask(DenoisingTask):
    """Predict a noised image embedding from it, its level and its caption (Ramesh et al. 2022, section 2.2, eq. 2)."""

    def __init__(self, recipe: TrainPriorRecipe, bench: Workbench) -> None:
        self.recipe = recipe
        encoder = PriorBatchEncoder(recipe, bench.device, bench.run.warn)
        model = build_model(PriorTransformer, recipe.model, recipe)
        codec = EmbeddingCodec(_normalizer(recipe, bench, encoder, model), encoder.image_encoder)
        scheduler = ClippingScheduler.ours(recipe.diffusion.to_mapping())
        self.prior = Prior(model, codec, encoder.encoder, scheduler.settings, limit=scheduler.limit)
        super().__init__(recipe, bench, encoder, self.prior)
        self._frozen -= _MEASURED
        bench.run.share(self.save_unchanged)
        purposes = ["initial noise", *(f"noise {step}" for step in range(recipe.validation.steps))]
        self._keys = [philox.key(recipe.seed, f"validation prior {purpose}") for purpose in purposes]

    def validate(self) -> dict[str, float]:
        """The held-out loss, and cosines to the true embeddings: means, and the standard errors of the first three.

        `val_cosine` is that of sampled embeddings, `val_text_cosine` that of CLIP's text embeddings,
        `val_random_cosine` that of embeddings sampled for another caption, and `val_cosine/levelN` that of the
        prediction at a noise level, the middle of one of equal ranges.
        """
        if not (figures := super().validate()):
            return {}
        cosines = torch.cat(in_turns(self.bench.held_out, self._cosines, self.bench.sharing)).cpu()
        std, mean = torch.std_mean(cosines, dim=0)
        figures |= dict(zip(_COSINES, mean.tolist(), strict=False))
        errors = (std / len(cosines) ** 0.5).tolist()
        figures |= {f"{name}_error": error for name, error in zip(_COSINES, errors, strict=False)}
        return figures | {f"val_cosine/level{i}": value for i, value in enumerate(mean[len(_COSINES) :].tolist())}

    @torch.no_grad()
    def _cosines(self, batch: Batch) -> Tensor:
        """A row for each sample: the cosines of `_COSINES`, and those at each noise level; float64."""
        sent, moments, condition = self.encoded(batch)
        true, family, z = moments[EMBEDDINGS], self.prior, self.prior.codec.latents(moments)

        def noise(number: int) -> Tensor:
            return philox.normal(self._keys[number], sent.epoch, sent.position, tuple(z.shape[1:]))

        steps, empty = self.recipe.validation, self.denoising.empty
        sampled = sampled_embeddings(family, condition, empty, steps, noise(0), lambda step: noise(1 + step))
        assert condition.pooled is not None
        found = [sampled, condition.pooled, sampled.roll(1, 0)]
        for level in range(NUM_NOISE_LEVELS):
            u = torch.full((len(z),), (level + 0.5) / NUM_NOISE_LEVELS, device=z.device)
            a, b, time = family.process.at(u)
            found.append(family.codec.decode(family.denoiser(add_noise(z, noise(0), a, b), time, condition)))
        return torch.stack([cosine_similarity(one.double(), true.double()) for one in found], dim=1)

    def save_unchanged(self, folder: Path) -> None:
        """With the normalizer."""
        super().save_unchanged(folder)
        normalizer = self.prior.codec.normalizer
        save_model(folder / IMAGE_NORMALIZER, normalizer.state_dict(), normalizer.config.to_hugging_face())


def _normalizer(
    recipe: TrainPriorRecipe, bench: Workbench, encoder: PriorBatchEncoder, model: PriorTransformer
) -> ImageNormalizer:
    """Measured, and given to the model; or that of the model of `start_from`, on the device."""
    if recipe.start_from is not None:
        return ImageNormalizer.of(model.clip_mean, model.clip_std).to(bench.device)
    normalizer = measured_normalizer(recipe, bench, encoder, recipe.num_measured)
    model.clip_mean.data.copy_(normalizer.mean)
    model.clip_std.data.copy_(normalizer.std)
    return normalizer
