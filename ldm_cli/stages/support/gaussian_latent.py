"""The Gaussian latent of an AutoencoderKL in training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from ldm_cli import philox
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.latent_space import standardized
from ldm_cli.core.pixels import to_signed
from ldm_cli.core.vae_loss import kl_loss
from ldm_cli.data.batch import Batch
from ldm_cli.stages.support.latent import LatentTerms, finite_scale


class GaussianLatent:
    """Samples the posterior, and measures its mean and deviation at the end; see `Latent`."""

    auxiliary: dict[str, nn.Module]

    def __init__(self, vae: AutoencoderKL, kl_weight: float, seed: int) -> None:
        self.auxiliary = {}
        self._vae, self._kl_weight = vae, kl_weight
        self._noise_key = philox.key(seed, "posterior noise")

    def through(self, images: Tensor, batch: Batch, start: int, step: int) -> tuple[Tensor, LatentTerms]:
        """See `Latent`."""
        posterior = self._vae.posterior(images)
        reconstruction = self._vae.decode_z(posterior.sample(self._noise(batch, posterior.mean)))
        return reconstruction, LatentTerms({"kl": (self._kl_weight, kl_loss(posterior, images))})

    def held_out_rows(self, images: Tensor) -> Tensor:
        """See `Latent`."""
        return images.new_empty(0, len(images))

    def held_out_figures(self, rows: Tensor) -> dict[str, float]:
        """See `Latent`."""
        return {}

    def finalize(self, batches: Callable[[], Iterable[Batch]], frozen: Collection[str]) -> dict[str, float]:
        """Standardize the latent, channel by channel; measure its mean and deviation, and store them. See `Latent`.

        Channels differ in deviation by an order of magnitude, and pipelines of Stable Diffusion 1 and 2 apply
        one scale and no shift. So mean and deviation of each channel go into the 1×1 convolutions around the
        latent, which leaves every reconstruction as it was; the values measured then and stored as
        `scaling_factor` and `shift_factor` are 1 and 0 but for rounding. Where those convolutions are missing or
        frozen, the overall mean and deviation are stored, as in Stable Diffusion 3.
        """
        mean, deviation, overall = self._statistics(batches())
        weights = standardized(self._vae.state_dict(), mean, deviation)
        if weights is None or any("quant_conv." in name for name in frozen):
            shift = mean.mean().item()
        else:
            self._vae.load_state_dict(weights)
            _, _, overall = self._statistics(batches())
            shift = 0.0
        factors = {"scaling_factor": finite_scale(overall, shift), "shift_factor": shift}
        self._vae.config = self._vae.config.model_copy(update=factors)
        return factors

    def _statistics(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, float]:
        """Means [C], deviations [C] and the overall deviation of sampled latents."""
        latents = []
        for batch in batches:
            posterior = self._vae.posterior(to_signed(batch.images, batch.images.device))
            latents.append(posterior.sample(self._noise(batch, posterior.mean)).double())
        stack = torch.cat(latents)
        return stack.mean(dim=(0, 2, 3)), stack.std(dim=(0, 2, 3)), stack.std().item()

    def _noise(self, batch: Batch, like: Tensor) -> Tensor:
        return philox.normal(self._noise_key, batch.epoch, batch.position, tuple(like.shape[1:]))
