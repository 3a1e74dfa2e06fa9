"""Models that enlarge pictures as pipelines: of a given picture, and of what another pipeline generates."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

from torch import Tensor

from ldm_cli.errors import UsageError
from ldm_cli.families.family import Family
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import GeneratedImage, Requests
from ldm_cli.sampling.sample_options import PLAIN, SampleOptions
from ldm_cli.sampling.upscaling import Upscaling, upscale

_TOGETHER = 8  # pictures that are enlarged at a time


class UpscalePipeline(Pipeline):
    """Enlarges the picture to work on, once for each request; `width` and `height` are its own.

    Args:
        family: a model with `low_resolution`.
        noise_level: of the noise on the small picture; None: the model's own.
    """

    meaningless_edit: ClassVar[tuple[str, ...]] = ("strength", "mask", "extend", "style", "style_strength")

    def __init__(self, family: Family, noise_level: int | None = None) -> None:
        super().__init__(family)
        self._noise_level = noise_level

    @property
    def facts(self) -> dict[str, Any]:
        """See `Pipeline`; with the level of the noise."""
        return super().facts | {"upscale": {"noise_level": self._upscaling(SamplingConfig(), PLAIN).level}}

    @property
    def multiple(self) -> int:
        """Pictures of any size are enlarged."""
        return 1

    def image_size(self, config: SamplingConfig) -> tuple[int, int]:
        """See `PicturePipeline`."""
        if config.height is None or config.width is None:
            remedy = "add --init PICTURE, or give it as --upscale after another model"
            raise UsageError("this model enlarges pictures", "none is given", remedy)
        return config.height, config.width

    def latent_shape(self, config: SamplingConfig) -> tuple[int, int, int]:
        """Of the result."""
        low, (height, width) = self._upscaling(config, PLAIN).low, self.image_size(config)
        return self.family.codec.channels, height * low.latent_factor, width * low.latent_factor

    def check(
        self, requests: Requests, config: SamplingConfig, noise: Tensor | None = None, options: SampleOptions = PLAIN
    ) -> None:
        """See `PicturePipeline`."""
        super().check(requests, config, noise, options)
        self._upscaling(config, options).check()
        if noise is not None:
            raise UsageError("--latents has no meaning for a model that enlarges pictures", remedy="leave it out")
        if options.preview_every:
            raise UsageError("a model that enlarges pictures has no previews", remedy="leave --preview-every out")
        if options.edit_input is None:
            self.image_size(SamplingConfig())

    def _generate(
        self,
        requests: Requests,
        config: SamplingConfig,
        noise: Tensor | None,
        reporter: Reporter,
        options: SampleOptions,
    ) -> Iterator[GeneratedImage]:
        """See `PicturePipeline`."""
        assert options.edit_input is not None  # `check`
        pictures = [options.edit_input.pixels] * len(requests)
        yield from upscale(self._upscaling(config, options), pictures, requests, reporter, options.on_nonfinite)

    def _upscaling(self, config: SamplingConfig, options: SampleOptions) -> Upscaling:
        tile = None if options.window is None else options.window * self.family.codec.factor
        return Upscaling(self.family, config, self._noise_level, tile, options.weighted)


class UpscaledPipeline(PicturePipeline):
    """Another pipeline, whose pictures are enlarged; all settings but those of `upscaling` are that one's."""

    def __init__(self, inner: PicturePipeline, upscaling: Upscaling) -> None:
        super().__init__(inner.family)
        self._inner, self._upscaling = inner, upscaling

    @property
    def facts(self) -> dict[str, Any]:
        """See `PicturePipeline`; with the settings and the weights of the upscaler."""
        upscaling, family = self._upscaling, self._upscaling.family
        settings = {
            "noise_level": upscaling.level,
            "tile": upscaling.tile,
            "sampling": Pipeline(family).recorded(upscaling.config),
            "weights": family.weights_sha256,
        }
        return self._inner.facts | {"upscale": settings}

    def image_size(self, config: SamplingConfig) -> tuple[int, int]:
        """Of the small pictures."""
        return self._inner.image_size(config)

    def recorded(self, config: SamplingConfig) -> dict[str, Any]:
        """See `PicturePipeline`."""
        return self._inner.recorded(config)

    def check(
        self, requests: Requests, config: SamplingConfig, noise: Tensor | None = None, options: SampleOptions = PLAIN
    ) -> None:
        """See `PicturePipeline`."""
        self._inner.check(requests, config, noise, options)
        self._upscaling.check()

    def generate(
        self,
        requests: Requests,
        config: SamplingConfig,
        noise: Tensor | None = None,
        reporter: Reporter | None = None,
        options: SampleOptions = PLAIN,
    ) -> Iterator[GeneratedImage]:
        """See `PicturePipeline`."""
        small = self._inner.generate(requests, config, noise, reporter, options)
        while found := list(islice(small, _TOGETHER)):
            pictures, asked = [image.pixels for image in found], [image.request for image in found]
            for large in upscale(self._upscaling, pictures, asked, on_nonfinite=options.on_nonfinite):
                yield GeneratedImage(found[large.index].index, large.request, large.pixels)

    def _generate(self, *_: Any) -> Iterator[GeneratedImage]:
        """`generate` does all."""
        raise NotImplementedError
