"""The codebook of a VQModel in training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from ldm_cli import philox
from ldm_cli.core.codebook import RunningCodebook, codebook_loss, commitment_loss, grid_codes, perplexity, usage
from ldm_cli.core.codebook_config import CodebookConfig
from ldm_cli.core.models.vq_model import VQModel, straight_through
from ldm_cli.core.pixels import to_signed
from ldm_cli.data.batch import Batch
from ldm_cli.stages.support.latent import LatentTerms, finite_scale


class DiscreteLatent:
    """Quantizes with straight-through gradients, and learns the codebook; see `Latent`.

    Args:
        vae: its codebook gets no gradient unless the configuration says `gradient`. A frozen one stays as it is.
        seed: of the vectors at which codes start again.
        batch_size: of the global batch.
        is_trained: whether the codebook comes from `start_from`.
    """

    auxiliary: dict[str, nn.Module]

    def __init__(self, vae: VQModel, config: CodebookConfig, seed: int, batch_size: int, is_trained: bool) -> None:
        self.auxiliary = {}
        self._vae, self._config, self._batch_size = vae, config, batch_size
        self._image_key = philox.key(seed, "codebook restarts: image")
        self._place_key = philox.key(seed, "codebook restarts: place")
        self._running: RunningCodebook | None = None
        weight = vae.quantize.embedding.weight
        if config.kind == "fsq":
            with torch.no_grad():
                weight.requires_grad_(False).copy_(grid_codes(config.levels))
        elif config.kind == "ema" and weight.requires_grad:
            self._running = RunningCodebook(vae.quantize, config.decay, config.restart_below, is_trained)
            self.auxiliary["codebook"] = self._running

    def through(self, images: Tensor, batch: Batch, start: int, step: int) -> tuple[Tensor, LatentTerms]:
        """See `Latent`."""
        z = self._vae.encode_z(images).float()
        indices = self._vae.quantize.nearest(z.detach())
        codes = self._vae.quantize.codes(indices)
        weighted = {"commitment": (self._config.commitment_weight, commitment_loss(z, codes))}
        if codes.requires_grad:
            weighted["codebook"] = (1.0, codebook_loss(z, codes))
        shares = usage(indices, self._vae.config.num_vq_embeddings)
        figures = {"perplexity": perplexity(shares), "codes_used": (shares > 0).float().mean()}
        if self._running is not None:
            figures["dead_codes"] = self._running.num_dead()
            self._running.observe(z, indices, self._candidates(z.detach(), codes, start, step))
        return self._vae.decode_codes(straight_through(z, codes)), LatentTerms(weighted, figures)

    def _candidates(self, z: Tensor, codes: Tensor, start: int, step: int) -> Tensor:
        """The argument of `RunningCodebook.observe`: for each code a vector of an image of the global batch.

        The image is drawn evenly; of its vectors one, by the squares of their distances from their codes, as in
        k-means++ (Arthur & Vassilvitskii 2007, section 2.2), or else flat areas would get nearly all codes. The part
        that has the image gives the vector, times the number of parts; the others give 0.
        """
        size = len(z)
        code = torch.arange(self._vae.config.num_vq_embeddings, device=z.device)
        steps = torch.full_like(code, step)
        image = philox.integers(self._image_key, steps, code, 1, self._batch_size)[:, 0] - start
        is_here = (image >= 0) & (image < size)
        image = image.clamp(0, size - 1)
        sums = (z - codes).square().sum(dim=1).flatten(1).cumsum(dim=1)[image]
        drawn = philox.uniform(self._place_key, steps, code, 1) * sums[:, -1:]
        place = torch.searchsorted(sums, drawn)[:, 0].clamp(max=sums.shape[1] - 1)
        vectors = z.permute(0, 2, 3, 1).flatten(1, 2)[image, place]
        return vectors * is_here[:, None] * (self._batch_size // size)

    def held_out_rows(self, images: Tensor) -> Tensor:
        """The indices of each image; see `Latent`."""
        return self._vae.encode_indices(images).flatten(1).T.float()

    def held_out_figures(self, rows: Tensor) -> dict[str, float]:
        """How many codes the held-out images use, and how evenly; see `Latent`."""
        shares = usage(rows.long(), self._vae.config.num_vq_embeddings)
        used = shares > 0
        return {
            "val_perplexity": perplexity(shares).item(),
            "val_codes_used": used.float().mean().item(),
            "val_dead_codes": float((~used).sum()),
        }

    def finalize(self, batches: Callable[[], Iterable[Batch]], frozen: Collection[str]) -> dict[str, float]:
        """Store the deviation of the vectors before they are quantized as `scaling_factor`; see `Latent`."""
        vectors = [self._vae.encode_z(to_signed(batch.images, batch.images.device)).double() for batch in batches()]
        factors = {"scaling_factor": finite_scale(torch.cat(vectors).std().item())}
        self._vae.config = self._vae.config.model_copy(update=factors)
        return factors
