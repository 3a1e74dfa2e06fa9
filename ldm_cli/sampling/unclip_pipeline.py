"""unCLIP: image embeddings from prompts or of pictures, mixed, moved, noised, and decoded into pictures.

Letters: N pictures, E size of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm_cli.errors import UsageError
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.families.unclip import UnCLIP
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.latent_sampler import LatentSampler
from ldm_cli.sampling.noise import initial_noise, slerp
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.prior_sampler import embeddings_of
from ldm_cli.sampling.request import ImageRequest, Requests
from ldm_cli.sampling.sample_options import PLAIN, SampleOptions, TextDifference

Warn = Callable[[str], None]


class UnCLIPPipeline(Pipeline):
    """Generates pictures with an unCLIP model.

    The embedding of a picture is the prior's for its prompt and seed, or that of a given picture. A request with a
    blend has the embedding on the arc between both of its ends.
    """

    family: UnCLIP
    meaningless: ClassVar[tuple[str, ...]] = ("temperature", "top_k", "top_p")

    @property
    def facts(self) -> dict[str, Any]:
        """See `Pipeline`; with the schedulers of the prior and of the noise on embeddings."""
        prior, noising = self.family.prior, vars(self.family.noising)
        further = {"image_noising": noising | {"settings": vars(self.family.noising.settings)}}
        if prior is not None:
            further["prior"] = {"settings": vars(prior.settings), "limit": prior.limit}
        return {"scheduler": super().facts["scheduler"] | further}

    def check(
        self, requests: Requests, config: SamplingConfig, noise: Tensor | None = None, options: SampleOptions = PLAIN
    ) -> None:
        """See `PicturePipeline`."""
        super().check(requests, config, noise, options)
        if self.family.prior is not None:
            return
        remedy = "add a prior with ldm convert --prior"
        if options.image_embeds is None:
            raise UsageError("no picture is given", "this model has no prior", f"give --image, or {remedy}")
        if options.text_difference is not None:
            raise UsageError("--from-text and --to-text need a prior's text encoder", "this model has none", remedy)

    def _sampler(
        self, requests: Requests, config: SamplingConfig, options: SampleOptions, reading: PromptReading, warn: Warn
    ) -> LatentSampler:
        """See `Pipeline`."""
        family, device = self.family, self.family.device
        embeddings = self._embeddings(requests, config, options, reading, warn)
        if options.text_difference is not None:
            embeddings = self._moved(embeddings, options.text_difference, warn)
        noise = initial_noise(requests, (embeddings.shape[1],), device, "image embedding")
        level = (config.prior.noise_level + 0.5) / family.noise_process.num_timesteps
        u = torch.full((len(requests),), level, device=device)
        pooled = family.normalizer.augmented(embeddings, u, noise, family.noise_process)
        return replace(super()._sampler(requests, config, options, reading, warn), pooled=pooled)

    def _embeddings(
        self, requests: Requests, config: SamplingConfig, options: SampleOptions, reading: PromptReading, warn: Warn
    ) -> Tensor:
        """float32 [N, E]."""
        given, prior = options.image_embeds, self.family.prior
        if given is None:
            assert prior is not None
            plain = PromptReading(reading.weighted)
            # Both ends of each request; without a blend they are the same.
            ends = [(request, request.blend or request) for request in requests]
            wanted = {ImageRequest(end.prompt, end.seed): None for pair in ends for end in pair}
            rows = embeddings_of(prior, list(wanted), config.prior, plain, warn)
            found = dict(zip(wanted, rows, strict=True))
            pairs = [[found[ImageRequest(end.prompt, end.seed)] for end in pair] for pair in ends]
        else:
            moved = given.to(self.family.device, torch.float32).expand(len(requests), -1, -1)
            pairs = [[rows[0], rows[-1]] for rows in moved]
        mixed = [
            first if request.blend is None else slerp(first, last, request.blend.weight)
            for request, (first, last) in zip(requests, pairs, strict=True)
        ]
        return torch.stack(mixed)

    @torch.inference_mode()
    def _moved(self, embeddings: Tensor, difference: TextDifference, warn: Warn) -> Tensor:
        """Embeddings [N, E], moved along the arc towards a difference of texts (Ramesh et al. 2022, section 3.3)."""
        prior = self.family.prior
        assert prior is not None
        texts = [difference.source, difference.target]
        pooled = [
            prior.encoder.encode_prompts([text], PromptReading(), num_chunks=1, warn=warn).pooled for text in texts
        ]
        assert pooled[0] is not None
        assert pooled[1] is not None
        source, target = (one[0].float() / one[0].float().norm() for one in pooled if one is not None)
        direction = target - source
        if not bool(direction.any()):
            raise UsageError("--from-text and --to-text mean the same to CLIP", remedy="give two different texts")
        unit = direction / direction.norm()
        return torch.stack([slerp(one, unit * one.norm(), difference.amount) for one in embeddings])
