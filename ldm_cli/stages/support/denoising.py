"""What every trainer of a denoiser computes, whatever its family: the loss, the held-out loss, sample pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.level_distribution import random_levels
from ldm_cli.core.diffusion.loss import add_noise, diffusion_loss
from ldm_cli.data.batch import Batch
from ldm_cli.data.latent_cache import MASK
from ldm_cli.families.clip_t5_encoder import CLIPT5Encoder
from ldm_cli.families.family import Family, ImageGenerator
from ldm_cli.pictures.grid import image_grid
from ldm_cli.pictures.images import save_image
from ldm_cli.recipe.train_recipe import SamplesConfig
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import requests_for
from ldm_cli.sampling.sample_options import PLAIN, SampleOptions
from ldm_cli.sampling.upscaling import Upscaling, upscale
from ldm_cli.stages.support.patch_training import PatchTraining
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.shared_work import in_turns, merged

NUM_NOISE_LEVELS = 5
"""How many levels a held-out loss is measured at."""
_PURPOSES = ("posterior noise", "noise", "timestep", "caption dropout", "encoder dropout")


class AddedCondition(Protocol):
    """What a condition has beside the text, made of the picture itself."""

    def __call__(
        self, condition: Condition, batch: Batch, moments: Mapping[str, Tensor], *, is_training: bool
    ) -> Condition:
        """The condition, captions already dropped, with more fields; random numbers are those of the samples."""


Encoded = tuple[Batch, Mapping[str, Tensor], Condition]
"""A batch, the codec's moments of its images with the masks at their size, and its conditions."""


class Denoising:
    """The loss of predicting the noise (or v, x_0, u) in noised latents (Rombach et al. 2022, eq. 2).

    Batches are on the denoiser's device, where their random numbers are computed, too.

    Args:
        family: denoiser, codec, process.
        config: distribution of the noise levels, weights of the loss, caption dropout.
        seed: of all random numbers; each sample has its own, by epoch and position.
        empty: the condition that takes the place of a dropped one: one row.
        patches: of a transformer.
        added: what conditions have beside the text; None: nothing.
    """

    def __init__(
        self,
        family: Family,
        config: DiffusionConfig,
        seed: int,
        empty: Condition,
        patches: PatchTraining | None = None,
        added: AddedCondition | None = None,
    ) -> None:
        self.family, self.config, self.empty, self.patches, self._added = family, config, empty, patches, added
        self._keys = {purpose: philox.key(seed, purpose) for purpose in _PURPOSES}
        self._fixed_keys = {purpose: philox.key(seed, f"validation {purpose}") for purpose in _PURPOSES}

    def loss(
        self, batch: Batch, moments: Mapping[str, Tensor], condition: Condition, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean error of a batch, a scalar, and figures; each sample has its own level, noise and dropout.

        Of pictures of a subject and of its class, mixed 1:1, the latter with loss weight λ, it is on average half of
        DreamBooth's loss (Ruiz et al. 2022, arXiv:2208.12242, eq. 2).
        """
        u = random_levels(self.config, self._keys["timestep"], batch.epoch, batch.position)
        errors, tokens = self._error(batch, moments, self._with_dropout(batch, condition), u, self._keys, step)
        loss = (errors if batch.loss_weights is None else errors * batch.loss_weights).mean()
        return (loss, {}) if tokens is None or self.patches is None else self.patches.added(loss, tokens, batch)

    def _with_dropout(self, batch: Batch, condition: Condition) -> Condition:
        """The empty condition in place of some captions, and zeros in place of what some encoders made of others."""
        encoder, config = self.family.encoder, self.config
        dropped = self._uniform("caption dropout", batch, 1)[:, 0] < config.caption_dropout
        if config.encoder_dropout and isinstance(encoder, CLIPT5Encoder):
            left_out = self._uniform("encoder dropout", batch, len(encoder.models)) < config.encoder_dropout
            condition, dropped = encoder.without(condition, left_out), dropped | left_out.all(dim=1)
        return condition.replaced(dropped, self.empty)

    def _uniform(self, purpose: str, batch: Batch, count: int) -> Tensor:
        return philox.uniform(self._keys[purpose], batch.epoch, batch.position, count)

    def validate(
        self, held_out: Sequence[Batch], encoded: Callable[[Batch], Encoded], ranks: Ranks
    ) -> dict[str, float]:
        """Held-out loss with fixed noise at fixed levels, the middles of equal ranges of u: mean and each.

        Args:
            held_out: the batches, which the ranks share.
            encoded: gives a batch with its encodings.
        """

        def errors(held: Batch) -> Tensor:
            batch, moments, condition = encoded(held)
            sums = torch.zeros(NUM_NOISE_LEVELS, dtype=torch.float64, device=self.family.device)
            for level in range(NUM_NOISE_LEVELS):
                u = torch.full((len(batch),), (level + 0.5) / NUM_NOISE_LEVELS, device=sums.device)
                sums[level] = self._error(batch, moments, condition, u, self._fixed_keys)[0].double().sum()
            return sums

        if not held_out:
            return {}
        sums = torch.stack(in_turns(held_out, errors, ranks)).sum(dim=0)
        means = (sums / sum(map(len, held_out))).tolist()
        return {"val_loss": sum(means) / len(means)} | {f"val_loss/level{i}": m for i, m in enumerate(means)}

    def _error(
        self,
        batch: Batch,
        moments: Mapping[str, Tensor],
        condition: Condition,
        u: Tensor,
        keys: Mapping[str, philox.Key],
        step: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Weighted squared error per sample, float32 [B]; in a step of training also the tokens to be aligned."""
        family = self.family
        mode = family.codec.latents(moments)
        latents = family.codec.latents(moments, _normal(keys["posterior noise"], batch, mode))
        noise = _normal(keys["noise"], batch, latents)
        if family.takes_sizes and batch.sizes is not None:
            condition = condition.with_sizes(batch.sizes)
        if self._added is not None:
            condition = self._added(condition, batch, moments, is_training=step is not None)
        a, b, time = family.process.at(u)
        given: dict[str, Any] = {}
        mask = moments.get(MASK)
        if self.patches is not None and step is not None:
            given, mask = self.patches.given(batch, latents, mask, step)
        output = family.denoiser(add_noise(latents, noise, a, b), time, condition, **given)
        output, tokens = output if isinstance(output, tuple) else (output, None)
        output = output[:, : latents.shape[1]]  # of pixels, without the channels of a variance
        gamma = self.config.snr_gamma
        return diffusion_loss(family.process.prediction, output, latents, noise, a, b, gamma, mask), tokens


def _normal(key: philox.Key, batch: Batch, like: Tensor) -> Tensor:
    return philox.normal(key, batch.epoch, batch.position, tuple(like.shape[1:]))


def generate_samples(
    family: ImageGenerator,
    config: SamplesConfig,
    captions: Sequence[str],
    folder: Path | None,
    warn: Callable[[str], None],
    ranks: Ranks,
    embeddings: Tensor | None = None,
    options: SampleOptions = PLAIN,
    small: Sequence[Tensor] = (),
) -> None:
    """`grid.png` of the fixed prompts and seeds, and `prompts.json` with their names.

    Args:
        captions: held-out ones, which are the prompts if `config` names none.
        folder: where rank 0 writes.
        warn: is called for each picture that is not finite, and is left out.
        embeddings: unCLIP: of the pictures of the captions, [N, E], which are then varied.
        options: of all pictures; `on_nonfinite` is not used.
        small: pictures to enlarge, of a model that does so.
    """
    given = list(config.prompts) if embeddings is None else []
    prompts = given or list(captions[: config.num_prompts])
    if not prompts:
        return
    problems: list[str] = []
    options = replace(options, on_nonfinite=lambda error: problems.append(f"{error.what}: {error.cause}"))
    requests = requests_for(prompts, config.sampling)
    own = range(ranks.rank, len(requests), ranks.world_size)
    if embeddings is not None:
        rows = embeddings[: len(prompts)].repeat_interleave(config.sampling.images_per_prompt, 0)
        options = replace(options, image_embeds=rows[own.start :: own.step, None])
    asked = [requests[i] for i in own]
    if small and isinstance(family, Family):
        places = [i // config.sampling.images_per_prompt % len(small) for i in own]
        enlarging = Upscaling(family, config.sampling)
        generated = upscale(enlarging, [small[i] for i in places], asked, on_nonfinite=options.on_nonfinite)
    else:
        generated = pipeline_of(family).generate(asked, config.sampling, options=options)
    pixels = merged({str(own[picture.index]): picture.pixels.cpu() for picture in generated}, ranks)
    for text in ranks.texts(json.dumps(problems)):
        for problem in json.loads(text):
            warn(problem)
    if folder is None or not pixels:
        return
    save_image(folder / "grid.png", image_grid([pixels[name] for name in sorted(pixels, key=int)]))
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
