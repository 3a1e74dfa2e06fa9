"""Pictures enlarged by a diffusion model, whole or in parts that overlap.

Each part is sampled by itself, from the noise of its place in the picture and the small picture around it. So memory
is that of one part, whatever the size of the picture. Group norms and thresholds have the same statistics in all
parts, so that parts hardly differ where they overlap, and are blended there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm_cli.core.diffusion.guidance import percentile
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.core.shared_statistics import SharedStatistics
from ldm_cli.core.window import Window
from ldm_cli.errors import DivergedError, UsageError
from ldm_cli.families.family import Family
from ldm_cli.families.low_resolution import LowResolution
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.reporting import Progress, Reporter, SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.denoising import visited_timesteps
from ldm_cli.sampling.fixed_rows import DENOISED_PIXELS, filled, images_per_call, row_groups
from ldm_cli.sampling.guidance_models import GuidanceModels, guidance_folders
from ldm_cli.sampling.latent_sampler import LatentSampler, LowResolutionInput, prompt_conditions
from ldm_cli.sampling.noise import noise_of_window
from ldm_cli.sampling.pixels import is_sound
from ldm_cli.sampling.request import GeneratedImage, ImageRequest
from ldm_cli.sampling.sample_options import PLAIN, OnNonfinite
from ldm_cli.sampling.tiling import strips, windows

_PURPOSES = ("upscaling: initial noise", "upscaling: step noise", "upscaling: noise on the small picture")
_LEAST_TILE = 512  # pixels of the result; at borders of parts of 256 a photo jumps by 5 of 255, of 512 by 1
_MULTIPLE = 8  # of the small picture: where parts begin, so that a U-Net halves a part as it halves the whole


@dataclass(frozen=True)
class Upscaling:
    """How pictures are enlarged.

    Attributes:
        family: a model with `low_resolution`.
        config: sampler, steps, guidance, negative prompt; its size and seed are not used.
        noise_level: of the noise on the small picture; None: the model's own.
        tile: side in pixels of the parts of the result; None: the model's own size, at least 512.
        weighted: whether `(word:1.3)` in a prompt is a weight.
    """

    family: Family
    config: SamplingConfig
    noise_level: int | None = None
    tile: int | None = None
    weighted: bool = False

    @property
    def low(self) -> LowResolution:
        """What the model expects of small pictures.

        Raises:
            UsageError: it enlarges none.
        """
        if self.family.low_resolution is None:
            raise UsageError("this model does not enlarge pictures", remedy="give one that low_resolution trained")
        return self.family.low_resolution

    @property
    def level(self) -> int:
        """Level of the noise on the small picture."""
        return self.low.noise_level if self.noise_level is None else self.noise_level

    @property
    def window(self) -> int:
        """Side of a part, in pixels of the small picture."""
        own = max((side or 0) * self.family.codec.factor for side in self.family.sample_size)
        return (self.tile or max(own, _LEAST_TILE)) // self.low.factor

    def tiles(self, height: int, width: int, overlap: float = 1 / 4) -> list[Window]:
        """The parts of a small picture of height × width, which overlap by a share of their side at least."""
        return windows(height, width, self.window, int(overlap * self.window), _MULTIPLE)

    def check(self) -> None:
        """Find settings that the model cannot do.

        Raises:
            UsageError: naming them.
        """
        low = self.low
        if self.level > low.max_noise_level:
            cause = f"the model knows levels up to {low.max_noise_level}"
            raise UsageError(f"noise_level={self.level} is not possible", cause)
        if self.window < 2 * _MULTIPLE:
            raise UsageError(f"tile={self.tile} px is too small", remedy=f"give {2 * _MULTIPLE * low.factor} or more")
        self.family.encoder.check(PromptReading(clip_skip=self.config.clip_skip))
        visited_timesteps(self.family.process, self.family.settings, self.config)


def upscale(
    upscaling: Upscaling,
    pictures: Sequence[Tensor],
    requests: Sequence[ImageRequest],
    reporter: Reporter | None = None,
    on_nonfinite: OnNonfinite = PLAIN.on_nonfinite,
) -> Iterator[GeneratedImage]:
    """Enlarge pictures; on a CPU the result of each is the same bit for bit whatever the others are.

    Args:
        upscaling: the model and its settings.
        pictures: N of them, uint8 [3, h, w], of one size.
        requests: prompt and seed of each.
        reporter: receives progress.
        on_nonfinite: receives an error for each result that is not finite, in place of the result.

    Yields:
        uint8 [3, h · factor, w · factor]; `index` says of which picture.

    Raises:
        UsageError: settings that the model cannot do.
    """
    upscaling.check()
    reporter = reporter or SilentReporter()
    family, config = upscaling.family, upscaling.config
    height, width = pictures[0].shape[-2:]
    tiles = upscaling.tiles(height, width)
    reading = PromptReading(upscaling.weighted, config.long_prompts, config.clip_skip)
    work = _Work(
        upscaling,
        LatentSampler(
            family,
            config,
            prompt_conditions(family, requests, config.negative, reading, reporter.warn),
            GuidanceModels.load(guidance_folders(config.guidance, family), family),
            (height * upscaling.low.factor, width * upscaling.low.factor),
        ),
        (family.codec.channels, height * upscaling.low.latent_factor, width * upscaling.low.latent_factor),
    )
    size = tiles[0].height * tiles[0].width * upscaling.low.latent_factor**2
    most = config.batch_size if len(tiles) == 1 else 1
    with reporter.progress("upscaling", len(requests), unit="image") as progress:
        for group, rows in _groups(requests, work.sampler, size, most):
            own = work.without_guidance() if requests[group[0]].prompt == config.negative else work
            padded = [requests[i] for i in group] + [requests[group[-1]]] * (rows - len(group))
            small = filled(torch.stack([pictures[i] for i in group]), rows)
            made = own.images(small, padded, tiles, progress, group[0])
            finished = [(to_bytes(strip).cpu(), is_sound(strip).cpu()) for strip in made]
            pixels = torch.cat([strip for strip, _ in finished], dim=2)
            is_kept = torch.stack([kept for _, kept in finished]).all(dim=0)
            for i, found, kept in zip(group, pixels, is_kept.tolist(), strict=False):
                if kept:
                    yield GeneratedImage(i, requests[i], found)
                else:
                    on_nonfinite(_nonfinite(requests[i]))
            progress.update(group[-1] + 1)


@dataclass(frozen=True)
class _Work:
    """What all groups of one call of `upscale` have in common; `shape` is that of the latents of a whole picture."""

    upscaling: Upscaling
    sampler: LatentSampler
    shape: tuple[int, int, int]

    def without_guidance(self) -> _Work:
        """The same for prompts that equal the negative one, between which there is no difference to follow."""
        config = self.sampler.config
        if config.guidance.model is not None:
            return self
        guidance = config.guidance.model_copy(update={"scale": 1.0})
        return replace(self, sampler=replace(self.sampler, config=config.model_copy(update={"guidance": guidance})))

    @torch.inference_mode()
    def images(
        self, small: Tensor, requests: Sequence[ImageRequest], tiles: Sequence[Window], progress: Progress, done: int
    ) -> Iterator[Tensor]:
        """Pictures uint8 [N, 3, h, w] → strips of the results in about [−1, 1], from the top: [N, 3, …, W]."""
        family, low = self.upscaling.family, self.upscaling.low
        pictures = to_signed(small, family.device)
        level = torch.full((len(requests),), self.upscaling.level, device=family.device)
        seeds = [request.seed for request in requests]

        def part(tile: Window, statistics: SharedStatistics | None = None) -> Tensor:
            window = tile.scaled(low.latent_factor)
            initial, steps, noise = (
                noise_of_window(seeds, purpose, (channels, *self.shape[1:]), window, family.device)
                for purpose, channels in zip(_PURPOSES, (self.shape[0], self.shape[0], 3), strict=True)
            )
            size_of = percentile if statistics is None else statistics.percentile
            sampler = replace(self.sampler, low=LowResolutionInput(pictures, noise(0), level, window, steps, size_of))
            return family.codec.decode(sampler.sample(requests, initial(0), lambda predictor: predictor))

        progress.update(done)
        if len(tiles) == 1:
            yield part(tiles[0])
            return
        (height, width), weaker = small.shape[-2:], self.sampler.models.weaker
        statistics = SharedStatistics([*family.networks.values(), *([] if weaker is None else [weaker])])
        measured = self.upscaling.tiles(height, width, overlap=0)
        for number, tile in enumerate(measured, start=1):
            progress.update(done, {"measured": f"{number}/{len(measured)}"})
            with statistics.measured():
                part(tile, statistics)

        def parts() -> Iterator[tuple[Window, Tensor]]:
            for number, tile in enumerate(tiles, start=1):
                progress.update(done, {"part": f"{number}/{len(tiles)}"})
                with statistics.shared():
                    result = part(tile, statistics)
                yield tile.scaled(low.factor), result

        yield from strips(parts(), height * low.factor, width * low.factor)


def _groups(
    requests: Sequence[ImageRequest], sampler: LatentSampler, size: int, most: int
) -> Iterator[tuple[list[int], int]]:
    """Indices of the requests that are sampled together, whose prompts are equally long and differ all or none from
    the negative one; and the rows for it."""
    alike: dict[tuple[int, bool], list[int]] = {}
    for i, request in enumerate(requests):
        kind = sampler.conditions.num_chunks(request), request.prompt == sampler.config.negative
        alike.setdefault(kind, []).append(i)
    on_cpu = images_per_call(DENOISED_PIXELS, size)
    for indices in alike.values():
        for group, rows in row_groups(len(indices), on_cpu, sampler.family.device, most):
            yield indices[group], rows


def _nonfinite(request: ImageRequest) -> DivergedError:
    return DivergedError(
        f"the enlarged picture of {request.prompt[:60]!r} with seed {request.seed} is not finite",
        "the upscaler gives values that are not finite",
        "set its precision to bf16 or fp32, or check its weights",
    )
