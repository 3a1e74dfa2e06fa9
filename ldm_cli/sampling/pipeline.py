"""From prompts to pictures: encoder, noise, guided sampler and codec of a family as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm_cli.core.diffusion.config import GuidanceConfig
from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.samplers import CleanPredictor
from ldm_cli.core.first_nonfinite import first_nonfinite
from ldm_cli.errors import DivergedError, UsageError
from ldm_cli.families.family import Family
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.reporting import Progress, Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.denoising import sampler_of, visited_timesteps
from ldm_cli.sampling.fixed_rows import DENOISED_PIXELS, enough_rows, filled, images_per_call, row_groups
from ldm_cli.sampling.guidance_models import GuidanceModels, guidance_folders
from ldm_cli.sampling.latent_sampler import LatentSampler, prompt_conditions, prompts_of
from ldm_cli.sampling.noise import initial_noise
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.pixels import decode_pixels, encode_edit_input
from ldm_cli.sampling.request import GeneratedImage, ImageRequest, Requests
from ldm_cli.sampling.sample_options import PLAIN, SampleOptions


class Pipeline(PicturePipeline):
    """Generates pictures with a denoiser."""

    family: Family
    meaningless: ClassVar[tuple[str, ...]] = ("temperature", "top_k", "top_p", "prior")
    hint: ClassVar[str] = "it belongs to autoregressive models or unCLIP"

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._guidance: dict[Hashable, GuidanceModels] = {}
        self._enough: dict[Hashable, int] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """The scheduler, without its sampler: `recorded` names the one that is used."""
        return {"scheduler": {n: value for n, value in vars(self.family.settings).items() if n != "sampler"}}

    def recorded(self, config: SamplingConfig) -> dict[str, Any]:
        """See `PicturePipeline`."""
        return super().recorded(config) | {"sampler": sampler_of(self.family.settings, config)}

    def image_size(self, config: SamplingConfig) -> tuple[int, int]:
        """See `PicturePipeline`.

        Raises:
            UsageError: not a multiple of what codec and denoiser need, too large for the denoiser, or not known.
        """
        factor, sizes = self.family.codec.factor, []
        multiple, largest = factor * self.family.patch_size, self.family.largest_size
        asked_sizes, defaults = (config.height, config.width), self.family.sample_size
        for name, asked, default in zip(("height", "width"), asked_sizes, defaults, strict=True):
            if asked is None and default is None:
                raise UsageError(f"no {name} given", "the model does not say its own", "give --size WxH")
            size = asked if asked is not None else (default or 0) * factor
            if size % multiple:
                nearest = max(multiple, round(size / multiple) * multiple)
                raise UsageError(f"{name} {size} is not possible", f"not a multiple of {multiple}", f"take {nearest}")
            if largest is not None and size > largest * factor:
                cause = f"the denoiser has positions for {largest * factor} pixels"
                raise UsageError(f"{name} {size} is not possible", cause)
            sizes.append(size)
        return sizes[0], sizes[1]

    def check(
        self, requests: Requests, config: SamplingConfig, noise: Tensor | None = None, options: SampleOptions = PLAIN
    ) -> None:
        """See `PicturePipeline`."""
        super().check(requests, config, noise, options)
        shape, family, edit = self.latent_shape(config), self.family, options.edit_input
        if noise is not None and noise.shape != (len(requests), *shape):
            raise ValueError(f"noise of shape {tuple(noise.shape)}, expected {(len(requests), *shape)}")
        reading = PromptReading(clip_skip=config.clip_skip)
        family.encoder.check(reading)
        for prompt in dict.fromkeys([config.negative, *(request.prompt for request in requests)]):
            family.encoder.num_chunks(prompt, reading)  # raises where a prompt names a class that there is not
        visited_timesteps(family.process_at((shape[1], shape[2])), family.settings, config)
        if family.takes_mask and (edit is None or edit.mask is None):
            raise UsageError("this model fills masks", "no mask is given", "add --init and --mask, or --extend")
        if options.image_tokens is not None and config.guidance.model is not None:
            raise UsageError("image prompts and guidance.model do not go together", "the weaker model has no adapter")

    def _generate(
        self,
        requests: Requests,
        config: SamplingConfig,
        noise: Tensor | None,
        reporter: Reporter,
        options: SampleOptions,
    ) -> Iterator[GeneratedImage]:
        """See `PicturePipeline`."""
        family, edit, window, shape = self.family, options.edit_input, options.window, self.latent_shape(config)
        reading = PromptReading(options.weighted, config.long_prompts, config.clip_skip)
        sampler = self._sampler(requests, config, options, reading, reporter.warn)
        origin: str | None = None
        with reporter.progress("sampling", len(requests), unit="image") as progress:
            for images, rows in self._groups(requests, shape, sampler):
                group = list(requests[images])
                padded = group + [group[-1]] * (rows - len(group))
                start = initial_noise(padded, shape, family.device) if noise is None else filled(noise[images], rows)
                watch = partial(self._watched, progress=progress, images=images, options=options)
                x0 = sampler.of(images, rows).sample(padded, start, watch)[: len(group)]
                for i, pixels in enumerate(decode_pixels(family.codec, x0, window)):
                    if pixels is None:
                        if origin is None:  # of the first one: to find it takes as long as a picture
                            own = sampler.of(slice(images.start + i, images.start + i + 1), 1)
                            origin = self._origin(own, group[i], start[i : i + 1], reading)
                        options.on_nonfinite(_nonfinite(group[i], x0[i], sampler, origin))
                        continue
                    yield GeneratedImage(images.start + i, group[i], pixels if edit is None else edit.pasted(pixels))
                progress.update(images.stop)

    def _sampler(
        self,
        requests: Requests,
        config: SamplingConfig,
        options: SampleOptions,
        reading: PromptReading,
        warn: Callable[[str], None],
    ) -> LatentSampler:
        """What all groups of requests have in common."""
        family, edit, window = self.family, options.edit_input, options.window
        return LatentSampler(
            family,
            config,
            prompt_conditions(family, requests, config.negative, reading, warn),
            self._guidance_models(config.guidance),
            self.image_size(config),
            None if edit is None else encode_edit_input(family.codec, edit, family.device, window),
            window,
            image_tokens=options.image_tokens,
        )

    def _origin(self, sampler: LatentSampler, request: ImageRequest, noise: Tensor, reading: PromptReading) -> str:
        """Where the first value that is not finite comes from, on the way to a picture; as `first_nonfinite`."""
        family, negative = self.family, sampler.config.negative

        @torch.inference_mode()
        def again() -> None:
            conditions = prompt_conditions(family, [request], negative, reading, lambda message: None)
            x0 = replace(sampler, conditions=conditions).sample([request], noise, lambda predictor: predictor)
            decode_pixels(family.codec, x0, sampler.window)

        weaker = sampler.models.weaker
        others = {} if weaker is None else {"guidance.model": weaker}
        return first_nonfinite({**family.networks, **others}, again)

    def _guidance_models(self, config: GuidanceConfig) -> GuidanceModels:
        """The further networks of a guidance, loaded once."""
        folders = guidance_folders(config, self.family)
        key = tuple(folders.items())
        if key not in self._guidance:
            self._guidance[key] = GuidanceModels.load(folders, self.family)
        return self._guidance[key]

    def _groups(
        self, requests: Requests, shape: tuple[int, int, int], sampler: LatentSampler
    ) -> Iterator[tuple[slice, int]]:
        """The requests that are sampled together, and the rows for it; see `row_groups`. They follow one another, and
        their prompts have the same number of chunks."""
        config, window = sampler.config, sampler.window
        height, width = (side if window is None else min(side, window) for side in shape[1:])
        on_cpu, device = images_per_call(DENOISED_PIXELS, height * width), self.family.device
        # Compiled code is made for each number of rows; within and outside of an interval the numbers differ.
        can_try = not self.family.is_compiled and config.guidance.interval is None
        num_tokens = 0 if sampler.image_tokens is None else sampler.image_tokens.given.shape[1]

        @torch.inference_mode()
        def trial(request: ImageRequest, rows: int) -> Tensor:
            noise = initial_noise([replace(request, seed=seed) for seed in range(rows)], shape, device)
            level = Level(self.family.process.num_timesteps / 2, 0.5**0.5, 0.5**0.5)
            return sampler.of(slice(0, 1), rows).predictor([request] * rows)(noise, level)

        def enough(request: ImageRequest, count: int, full: int) -> int:
            question = count, full, shape, window, config.guidance, sampler.conditions.num_chunks(request), num_tokens
            if question not in self._enough:
                self._enough[question] = enough_rows(partial(trial, request), count, full)
            return self._enough[question]

        start = 0
        for _, alike in groupby(requests, key=sampler.conditions.num_chunks):
            first, *others = alike
            ask = partial(enough, first) if can_try else None
            for images, rows in row_groups(1 + len(others), on_cpu, device, config.batch_size, ask):
                yield slice(start + images.start, start + images.stop), rows
            start += 1 + len(others)

    def _watched(
        self, predict: CleanPredictor, progress: Progress, images: slice, options: SampleOptions
    ) -> CleanPredictor:
        """The predictor of x_0 for a group of images, which reports each call and shows previews."""
        calls, every, on_preview = 0, options.preview_every, options.on_preview

        def watched(x: Tensor, level: Level) -> Tensor:
            nonlocal calls
            calls += 1
            progress.update(images.start, {"calls": calls})
            x0 = predict(x, level)
            if on_preview is not None and every and calls % every == 0:
                codec = options.preview_codec or self.family.codec
                pictures = decode_pixels(codec, x0[: images.stop - images.start], options.window)
                if visible := [picture for picture in pictures if picture is not None]:
                    on_preview(torch.stack(visible))
            return x0

        return watched


def _nonfinite(request: ImageRequest, x0: Tensor, sampler: LatentSampler, origin: str) -> DivergedError:
    """The error that names a picture that is not finite, the first network whose output is not, and its layer."""
    chunks = sampler.conditions.num_chunks(request)
    rows = [sampler.conditions.rows[prompt, chunks] for prompt in prompts_of(request, sampler.config.negative)]
    conditions = [tensor for row in rows for tensor in row.tensors.values()]
    if not all(bool(tensor.isfinite().all()) for tensor in conditions):
        culprit = "the text encoder"
    else:
        culprit = "the autoencoder" if bool(x0.isfinite().all()) else "the denoiser or its guidance"
    is_half = sampler.config.precision == "fp16"
    return DivergedError(
        f"the picture of {request.prompt[:60]!r} with seed {request.seed} is not finite",
        f"{culprit} {'overflows in fp16' if is_half else 'gives values that are not finite'}"
        + (f", first in {origin}" if origin else ""),
        "set sampling.precision to bf16 or fp32" if is_half else "lower sampling.guidance.scale, or check the weights",
    )
