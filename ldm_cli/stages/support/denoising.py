"""What every trainer of a denoiser computes, whatever its family: the loss, the held-out loss, sample pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.loss import add_noise, diffusion_loss
from ldm_cli.data.batch import Batch
from ldm_cli.data.latent_cache import MASK
from ldm_cli.families.family import Family, ImageGenerator
from ldm_cli.pictures.grid import image_grid
from ldm_cli.pictures.images import save_image
from ldm_cli.recipe.train_recipe import SamplesConfig
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import requests_for
from ldm_cli.sampling.sample_options import SampleOptions
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.shared_work import in_turns, merged

_NUM_NOISE_LEVELS = 5
_PURPOSES = ("posterior noise", "noise", "timestep", "caption dropout")

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
    """

    def __init__(self, family: Family, config: DiffusionConfig, seed: int, empty: Condition) -> None:
        self.family, self.config, self.empty = family, config, empty
        self._keys = {purpose: philox.key(seed, purpose) for purpose in _PURPOSES}
        self._fixed_keys = {purpose: philox.key(seed, f"validation {purpose}") for purpose in _PURPOSES}

    def loss(self, batch: Batch, moments: Mapping[str, Tensor], condition: Condition) -> Tensor:
        """The mean error of a batch, a scalar; each sample has its own level, noise and dropout.

        Of pictures of a subject and of its class, mixed 1:1, the latter with loss weight λ, it is on average half of
        DreamBooth's loss (Ruiz et al. 2022, arXiv:2208.12242, eq. 2).
        """
        dropped = philox.uniform(self._keys["caption dropout"], batch.epoch, batch.position, 1)[:, 0]
        condition = condition.replaced(dropped < self.config.caption_dropout, self.empty)
        errors = self._error(batch, moments, condition, self.levels(batch.epoch, batch.position), self._keys)
        return (errors if batch.loss_weights is None else errors * batch.loss_weights).mean()

    def levels(self, epoch: Tensor, position: Tensor) -> Tensor:
        """u of `Process.at` for each sample: float32 [B], in (0, 1)."""
        key = self._keys["timestep"]
        if self.config.timestep_sampling == "uniform":
            return philox.uniform(key, epoch, position, 1)[:, 0]
        return torch.sigmoid(philox.normal(key, epoch, position, (1,))[:, 0])

    def validate(
        self, held_out: Sequence[Batch], encoded: Callable[[Batch], Encoded], ranks: Ranks
    ) -> dict[str, float]:
        """Held-out loss with fixed noise at fixed levels, the middles of equal ranges of u: mean and each.

        Args:
            held_out: the batches, which the ranks share.
            encoded: gives a batch with its encodings.
            ranks: those that call.
        """

        def errors(held: Batch) -> Tensor:
            batch, moments, condition = encoded(held)
            sums = torch.zeros(_NUM_NOISE_LEVELS, dtype=torch.float64, device=self.family.device)
            for level in range(_NUM_NOISE_LEVELS):
                u = torch.full((len(batch),), (level + 0.5) / _NUM_NOISE_LEVELS, device=sums.device)
                sums[level] = self._error(batch, moments, condition, u, self._fixed_keys).double().sum()
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
    ) -> Tensor:
        """Weighted squared error per sample, float32 [B]."""
        family = self.family
        mode = family.codec.latents(moments)
        latents = family.codec.latents(moments, _normal(keys["posterior noise"], batch, mode))
        noise = _normal(keys["noise"], batch, latents)
        if family.takes_sizes and batch.sizes is not None:
            condition = condition.with_sizes(batch.sizes)
        a, b, time = family.process.at(u)
        output = family.denoiser(add_noise(latents, noise, a, b), time, condition)
        gamma, mask = self.config.snr_gamma, moments.get(MASK)
        return diffusion_loss(family.process.prediction, output, latents, noise, a, b, gamma, mask)


def _normal(key: philox.Key, batch: Batch, like: Tensor) -> Tensor:
    return philox.normal(key, batch.epoch, batch.position, tuple(like.shape[1:]))


def generate_samples(
    family: ImageGenerator,
    config: SamplesConfig,
    captions: Sequence[str],
    folder: Path | None,
    warn: Callable[[str], None],
    ranks: Ranks,
) -> None:
    """`grid.png` of the fixed prompts and seeds, and `prompts.json` with their names.

    Args:
        family: the model.
        config: prompts and sampling.
        captions: held-out ones, which are the prompts if `config` names none.
        folder: where rank 0 writes.
        warn: is called for each picture that is not finite, and is left out.
        ranks: those that call, and share the pictures.
    """
    prompts = list(config.prompts) or list(captions[: config.num_prompts])
    if not prompts:
        return
    problems: list[str] = []
    options = SampleOptions(on_nonfinite=lambda error: problems.append(f"{error.what}: {error.cause}"))
    requests = requests_for(prompts, config.sampling)
    own = range(ranks.rank, len(requests), ranks.world_size)
    generated = pipeline_of(family).generate([requests[i] for i in own], config.sampling, options=options)
    pixels = merged({str(own[picture.index]): picture.pixels.cpu() for picture in generated}, ranks)
    for text in ranks.texts(json.dumps(problems)):
        for problem in json.loads(text):
            warn(problem)
    if folder is None or not pixels:
        return
    save_image(folder / "grid.png", image_grid([pixels[name] for name in sorted(pixels, key=int)]))
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
