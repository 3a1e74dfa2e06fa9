"""What every trainer of a denoiser computes, whatever its family: the loss, the held-out loss, sample pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.loss import add_noise, diffusion_loss
from ldm_cli.data.batch import Batch
from ldm_cli.families.family import Family
from ldm_cli.pictures.grid import image_grid
from ldm_cli.pictures.images import save_image
from ldm_cli.recipe.schema import SamplesConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import requests_for
from ldm_cli.sampling.sample_options import SampleOptions

_NUM_NOISE_LEVELS = 5
_PURPOSES = ("posterior noise", "noise", "timestep", "caption dropout")

Encoded = tuple[Batch, Mapping[str, Tensor], Condition]
"""A batch, the codec's moments of its images, and its conditions."""


class Denoising:
    """The loss of predicting the noise (or v, x_0, u) in noised latents (Rombach et al. 2022, eq. 2).

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
        """The mean error of a batch, a scalar; each sample has its own level, noise and dropout."""
        dropped = philox.uniform(self._keys["caption dropout"], batch.epoch, batch.position, 1)[:, 0]
        is_dropped = (dropped < self.config.caption_dropout).to(next(iter(moments.values())).device)
        condition = condition.replaced(is_dropped, self.empty)
        return self._error(batch, moments, condition, self.levels(batch.epoch, batch.position), self._keys).mean()

    def levels(self, epoch: Tensor, position: Tensor) -> Tensor:
        """u of `Process.at` for each sample: float32 [B], in (0, 1)."""
        key = self._keys["timestep"]
        if self.config.timestep_sampling == "uniform":
            return philox.uniform(key, epoch, position, 1)[:, 0]
        return torch.sigmoid(philox.normal(key, epoch, position, (1,))[:, 0])

    def validate(self, held_out: Iterable[Encoded]) -> dict[str, float]:
        """Held-out loss with fixed noise at fixed levels, the middles of equal ranges of u: mean and each."""
        sums = torch.zeros(_NUM_NOISE_LEVELS, dtype=torch.float64, device=self.family.device)
        count = 0
        for batch, moments, condition in held_out:
            for level in range(_NUM_NOISE_LEVELS):
                u = torch.full((len(batch),), (level + 0.5) / _NUM_NOISE_LEVELS)
                sums[level] += self._error(batch, moments, condition, u, self._fixed_keys).double().sum()
            count += len(batch)
        if count == 0:
            return {}
        means = (sums / count).tolist()
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
        a, b, time = family.process.at(u.to(latents.device))
        output = family.denoiser(add_noise(latents, noise, a, b), time, condition)
        return diffusion_loss(family.process.prediction, output, latents, noise, a, b, self.config.snr_gamma)


def _normal(key: philox.Key, batch: Batch, like: Tensor) -> Tensor:
    return philox.normal(key, batch.epoch, batch.position, tuple(like.shape[1:])).to(like.device)


def generate_samples(
    family: Family, config: SamplesConfig, captions: Sequence[str], folder: Path, warn: Callable[[str], None]
) -> None:
    """`grid.png` of the fixed prompts and seeds, and `prompts.json` with their names.

    Args:
        family: the model.
        config: prompts and sampling.
        captions: held-out ones, which are the prompts if `config` names none.
        folder: where to write.
        warn: is called for each picture that is not finite, and is left out.
    """
    prompts = list(config.prompts) or list(captions[: config.num_prompts])
    if not prompts:
        return
    options = SampleOptions(on_nonfinite=lambda error: warn(f"{error.what}: {error.cause}"))
    pictures = Pipeline(family).generate(requests_for(prompts, config.sampling), config.sampling, options=options)
    if not (images := [picture.pixels for picture in pictures]):
        return
    save_image(folder / "grid.png", image_grid(images))
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
