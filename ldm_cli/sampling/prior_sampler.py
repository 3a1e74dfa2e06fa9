"""Image embeddings from captions: the prior's own sampling."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import GuidanceConfig
from ldm_cli.core.diffusion.guidance import guided
from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.samplers import NoiseSource
from ldm_cli.families.prior import Prior
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.sampling.config import PriorConfig, SamplingConfig
from ldm_cli.sampling.denoising import denoise
from ldm_cli.sampling.fixed_rows import texts_per_call
from ldm_cli.sampling.noise import initial_noise, step_noise
from ldm_cli.sampling.request import Requests


@torch.inference_mode()
def sampled_embeddings(
    prior: Prior, conditional: Condition, empty: Condition, config: PriorConfig, noise: Tensor, step: NoiseSource
) -> Tensor:
    """Embeddings as CLIP gives them, float32 [B, E].

    Args:
        conditional: B rows, of the captions.
        empty: one row, of the empty caption.
        noise: standard normal [B, E], where sampling begins.
    """
    dtype = next(prior.denoiser.parameters()).dtype

    def network(x: Tensor, level: Level, condition: Condition) -> Tensor:
        t = torch.full((1,), level.t, device=x.device)
        answer: Tensor = prior.denoiser(x.to(dtype), t, condition.map(lambda tensor: tensor.to(dtype)))
        return answer.float()

    rows = len(noise)
    unconditional = empty.map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))
    guidance = GuidanceConfig(scale=config.scale)
    predictor = guided(network, conditional, unconditional, guidance, prior.process.prediction)

    def clipped(x: Tensor, level: Level) -> Tensor:
        x0 = predictor(x, level)
        return x0 if prior.limit is None else x0.clamp(-prior.limit, prior.limit)

    steps = SamplingConfig(steps=config.steps)
    return prior.codec.decode(denoise(clipped, noise, prior.process, prior.settings, steps, step)).float()


def embeddings_of(
    prior: Prior, requests: Requests, config: PriorConfig, reading: PromptReading, warn: Callable[[str], None]
) -> Tensor:
    """The embedding of each request's prompt and seed, float32 [N, E]; those of blends are not mixed.

    On a CPU they are sampled one by one, so that none depends on the others.
    """
    size, found = texts_per_call(prior.device), []
    prompts = list(dict.fromkeys(["", *(request.prompt for request in requests)]))
    rows: dict[str, Condition] = {}
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        encoded = prior.encoder.encode_prompts(batch, reading, num_chunks=1, warn=warn)
        rows |= {prompt: encoded.map(itemgetter(slice(i, i + 1))) for i, prompt in enumerate(batch)}
    for start in range(0, len(requests), size):
        part = requests[start : start + size]
        conditional = Condition.cat([rows[request.prompt] for request in part])
        shape, device = (prior.codec.channels,), prior.device
        noise = initial_noise(part, shape, device, "prior")
        step = step_noise(part, shape, device, "prior")
        found.append(sampled_embeddings(prior, conditional, rows[""], config, noise, step))
    return torch.cat(found)
