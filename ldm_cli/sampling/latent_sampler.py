"""Requests and noise to latents: conditions, guidance, known regions, windows and sampler put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor, nn

from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import ThresholdConfig
from ldm_cli.core.diffusion.guidance import ConditionalNetwork, Percentile, along_score, guided, percentile
from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.samplers import CleanPredictor, NoiseSource
from ldm_cli.core.models.layers import guidance_embedding
from ldm_cli.core.window import Window
from ldm_cli.families.family import Family
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.sampling.config import SamplingConfig, SizesConfig
from ldm_cli.sampling.denoising import Start, denoise
from ldm_cli.sampling.edit_input import LatentEditInput
from ldm_cli.sampling.fixed_rows import filled, texts_per_call
from ldm_cli.sampling.guidance_models import GuidanceModels, perturbed_network
from ldm_cli.sampling.network import in_windows, keep_known_region
from ldm_cli.sampling.noise import step_noise
from ldm_cli.sampling.pixels import decode_images
from ldm_cli.sampling.request import ImageRequest, Requests
from ldm_cli.sampling.sample_options import ImageTokens

Watch = Callable[[CleanPredictor], CleanPredictor]
"""Wraps the x_0 predictor of a group, to count its calls or to look at its results."""


@dataclass(frozen=True)
class PromptConditions:
    """What the prompts of some requests are as conditions.

    Attributes:
        negative: the prompt that guidance steers away from.
        lengths: chunks of each prompt.
        rows: one row for each prompt and number of chunks that a request needs.
    """

    negative: str
    lengths: Mapping[str, int]
    rows: Mapping[tuple[str, int], Condition]

    def num_chunks(self, request: ImageRequest) -> int:
        """In how many chunks all prompts of a request are encoded: as many as the longest of them needs."""
        return max(self.lengths[prompt] for prompt in prompts_of(request, self.negative))


@dataclass(frozen=True)
class LowResolutionInput:
    """The pictures that a group of requests enlarges, or a part of them.

    Attributes:
        pictures, noise, level, window: as of `LowResolution.conditioned`.
        step_noise: what the sampler adds in each step.
        percentile: of `guided`.
    """

    pictures: Tensor
    noise: Tensor
    level: Tensor
    window: Window
    step_noise: NoiseSource
    percentile: Percentile = percentile


@dataclass(frozen=True)
class LatentSampler:
    """What all groups of one call of `Pipeline.generate` have in common.

    Attributes:
        image_size: height and width of the pictures, in pixels.
        edit: the picture to work on, if any.
        window: side, in latents, of the windows that the networks see; None: they see all.
        pooled: [N, P], pooled vectors of the N requests, beside which the guidance's other side has zeros; None: those
            of the prompts.
        image_tokens: of image prompts, if any.
        low: what is enlarged, of a family that does so.
    """

    family: Family
    config: SamplingConfig
    conditions: PromptConditions
    models: GuidanceModels
    image_size: tuple[int, int]
    edit: LatentEditInput | None = None
    window: int | None = None
    pooled: Tensor | None = None
    image_tokens: ImageTokens | None = None
    low: LowResolutionInput | None = None

    def of(self, images: slice, rows: int) -> LatentSampler:
        """The sampler of some of the requests, whose last one fills up the rows."""
        if self.pooled is None:
            return self
        return replace(self, pooled=filled(self.pooled[images], rows))

    @torch.inference_mode()
    def sample(self, requests: Requests, noise: Tensor, watch: Watch) -> Tensor:
        """Latents of some requests, float32 [N, C, h, w].

        Args:
            requests: N pictures.
            noise: standard normal [N, C, h, w], where sampling begins.
            watch: wraps the predictor of x_0.
        """
        device, edit = self.family.device, self.edit
        noise = noise.to(device, torch.float32, non_blocking=True)
        predictor = watch(self.predictor(requests))
        mask = None if edit is None or self.family.takes_mask else edit.mask
        if edit is not None and mask is not None:
            predictor = keep_known_region(predictor, edit.latents, mask, noise)
        x0 = denoise(
            predictor,
            noise,
            self.family.process_at((noise.shape[2], noise.shape[3])),
            self.family.settings,
            self.config,
            step_noise(requests, tuple(noise.shape[1:]), device) if self.low is None else self.low.step_noise,
            None if edit is None else self._start(edit, noise),
        )
        return x0 if edit is None or mask is None else torch.where(mask > 0, x0, edit.latents)

    def _start(self, edit: LatentEditInput, noise: Tensor) -> Start:
        num_steps = self.family.num_edit_steps(edit.strength, self.config.steps)
        return Start(edit.latents.expand_as(noise), num_steps)

    def predictor(self, requests: Requests) -> CleanPredictor:
        """x_t [N, C, h, w] and its level → guided x_0, of some requests, whose prompts have as many chunks."""
        guidance, family, image = self.config.guidance, self.family, self.image_tokens
        negative = self.conditions.rows[self.config.negative, self.conditions.num_chunks(requests[0])]
        conditional = Condition.cat([self._condition(request) for request in requests])
        unconditional = Condition.cat([negative] * len(requests))
        if self.pooled is not None:
            conditional = replace(conditional, pooled=self.pooled)
            unconditional = replace(unconditional, pooled=torch.zeros_like(self.pooled))
        if image is not None:
            conditional = replace(conditional, image_tokens=image.given.expand(len(requests), -1, -1))
            unconditional = replace(unconditional, image_tokens=image.absent.expand(len(requests), -1, -1))
        if family.guidance_width is not None:
            # The embedding of the scale, which the denoiser was distilled with, takes the place of the second call.
            guidance = guidance.model_copy(update={"scale": 1.0})
        if guidance.threshold is None and (found := family.settings.threshold) is not None:
            share, most = found["dynamic_thresholding_ratio"], found["sample_max_value"]
            guidance = guidance.model_copy(update={"threshold": ThresholdConfig(percentile=share, max_scale=most)})
        network = self._network(family.denoiser)
        model = guided(
            network,
            self._completed(conditional, len(requests), self.config.sizes),
            self._completed(unconditional, len(requests), self.config.negative_sizes or self.config.sizes),
            guidance,
            family.process.prediction,
            None if self.models.weaker is None else self._network(self.models.weaker),
            None if guidance.perturb is None else perturbed_network(network, family.denoiser, guidance.perturb),
            percentile if self.low is None else self.low.percentile,
        )
        if guidance.clip is None or self.models.clip is None:
            return model
        decode = partial(decode_images, family.codec, window=self.window)
        score = self.models.clip.of([request.prompt for request in requests], decode)
        return along_score(model, score, guidance.clip.scale)

    def _condition(self, request: ImageRequest) -> Condition:
        """One row, on the line between the request's two prompts if it has two."""
        chunks, blend = self.conditions.num_chunks(request), request.blend
        condition = self.conditions.rows[request.prompt, chunks]
        if blend is None or blend.prompt == request.prompt:
            return condition
        ends = [condition, self.conditions.rows[blend.prompt, chunks]]
        return Condition.combined(lambda pair: torch.lerp(pair[0], pair[1], blend.weight), ends)

    def _completed(self, condition: Condition, rows: int, sizes: SizesConfig) -> Condition:
        """With sizes, the scale's embedding, mask and masked latents as channels: whichever the denoiser takes."""
        edit, width = self.edit, self.family.guidance_width
        if self.family.takes_sizes:
            condition = condition.with_sizes(torch.tensor([sizes.resolved(*self.image_size)]))
        if width is not None:
            embedding = guidance_embedding(self.config.guidance.scale, width).to(self.family.device, non_blocking=True)
            condition = replace(condition, guidance=embedding.expand(rows, -1))
        if self.low is not None and (low := self.family.low_resolution) is not None:
            condition = low.conditioned(condition, self.low.pictures, self.low.noise, self.low.level, self.low.window)
        if not self.family.takes_mask or edit is None or edit.mask is None or edit.masked_latents is None:
            return condition
        return replace(condition, concat=torch.cat([edit.mask, edit.masked_latents], dim=1).expand(rows, -1, -1, -1))

    def _network(self, denoiser: nn.Module) -> ConditionalNetwork:
        """A denoiser in its own type, in windows if asked for."""
        dtype = next(denoiser.parameters()).dtype

        def network(x: Tensor, level: Level, condition: Condition) -> Tensor:
            # Times and sizes stay float32: half precision cannot tell 998 from 999.
            t = torch.full((1,), level.t, device=x.device)
            cast = replace(condition.map(lambda tensor: tensor.to(dtype)), pooled=condition.pooled)
            prediction: Tensor = denoiser(x.to(dtype), t, cast)[:, : x.shape[1]]  # without a variance
            return prediction.to(torch.float32, copy=True)  # a replayed network writes the next one into its place

        return network if self.window is None else in_windows(network, self.window)


def prompts_of(request: ImageRequest, negative: str) -> tuple[str, ...]:
    """The prompts that a picture depends on."""
    return request.prompt, *([request.blend.prompt] if request.blend else []), negative


def prompt_conditions(
    family: Family, requests: Requests, negative: str, reading: PromptReading, warn: Callable[[str], None]
) -> PromptConditions:
    """The conditions of all prompts of some requests; arguments as of `Encoder.encode_prompts`."""
    prompts = dict.fromkeys(prompt for request in requests for prompt in prompts_of(request, negative))
    lengths = {prompt: family.encoder.num_chunks(prompt, reading) for prompt in prompts}
    conditions = PromptConditions(negative, lengths, rows := {})
    wanted: dict[int, dict[str, None]] = {}
    for request in requests:
        own = wanted.setdefault(conditions.num_chunks(request), {})
        own |= dict.fromkeys(prompts_of(request, negative))
    size = texts_per_call(family.device)
    for chunks, unique in wanted.items():
        for start in range(0, len(unique), size):
            batch = [*unique][start : start + size]
            encoded = family.encoder.encode_prompts(batch, reading, num_chunks=chunks, warn=warn)
            for i, prompt in enumerate(batch):
                rows[prompt, chunks] = encoded.map(itemgetter(slice(i, i + 1)))
    return conditions
