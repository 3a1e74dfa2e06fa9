"""From prompts to pictures, stage by stage: small ones are generated, then enlarged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

from pydantic import ValidationError
from torch import Tensor

from ldm_cli.config import causes
from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.families.cascade import Cascade, Stage
from ldm_cli.formats.pipeline_folder import INDEX_NAME
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.cascade_config import SHARED, StageConfig
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import GeneratedImage, Requests
from ldm_cli.sampling.sample_options import PLAIN, SampleOptions
from ldm_cli.sampling.upscale_pipeline import UpscaledPipeline
from ldm_cli.sampling.upscaling import Upscaling

_OF_THE_JOB = (*SHARED, "images_per_prompt", "seed", "width", "height")
_OF_A_STAGE = tuple(name for name in SamplingConfig.model_fields if name not in _OF_THE_JOB)


class CascadePipeline(PicturePipeline):
    """Generates pictures with a cascade; how each stage samples is a setting of its folder."""

    family: Cascade
    meaningless: ClassVar[tuple[str, ...]] = (
        *(name for name in _OF_A_STAGE if name != "guidance"),
        *("guidance.scale", "guidance.rescale", "guidance.interval", "guidance.threshold", "guidance.apg"),
        *("guidance.perturb", "guidance.model", "guidance.clip"),
    )
    hint: ClassVar[str] = f"each stage of a cascade has its own: change {INDEX_NAME}"

    def __init__(self, family: Cascade) -> None:
        super().__init__(family)
        self._settings = [_settings(stage, family) for stage in family.stages]
        self._base = Pipeline(family.stages[0].family)

    @property
    def facts(self) -> dict[str, Any]:
        """The settings and the scheduler of each stage."""
        found = {}
        for stage, settings in zip(self.family.stages, self._settings, strict=True):
            pipeline = Pipeline(stage.family)
            own = {name: value for name, value in pipeline.recorded(settings.sampling).items() if name in _OF_A_STAGE}
            found[stage.name] = {"sampling": own, "noise_level": settings.noise_level, **pipeline.facts}
        return {"stages": found}

    def image_size(self, config: SamplingConfig) -> tuple[int, int]:
        """See `PicturePipeline`."""
        height, width = self._base.image_size(self._base_config(config))
        return height * self.family.factor, width * self.family.factor

    def latent_shape(self, config: SamplingConfig) -> tuple[int, int, int]:
        """See `PicturePipeline`: those of the first stage."""
        return self._base.latent_shape(self._base_config(config))

    def _base_config(self, config: SamplingConfig) -> SamplingConfig:
        """The settings of the first stage, whose pictures are small.

        Raises:
            UsageError: a size that is no multiple of what the stages enlarge by.
        """
        size = {}
        for name in ("height", "width"):
            asked, factor = getattr(config, name), self.family.factor
            if asked is not None and asked % factor:
                nearest = max(1, round(asked / factor)) * factor
                raise UsageError(f"{name} {asked} is not possible", f"not a multiple of {factor}", f"take {nearest}")
            size[name] = None if asked is None else asked // factor
        return self._settings[0].for_job(config).model_copy(update=size)

    def _upscalings(self, config: SamplingConfig, options: SampleOptions) -> list[Upscaling]:
        stages = zip(self.family.stages[1:], self._settings[1:], strict=True)
        return [
            Upscaling(stage.family, own.for_job(config), own.noise_level, options.window, options.weighted)
            for stage, own in stages
        ]

    def check(
        self, requests: Requests, config: SamplingConfig, noise: Tensor | None = None, options: SampleOptions = PLAIN
    ) -> None:
        """See `PicturePipeline`."""
        super().check(requests, config, noise, options)
        if options.edit_input is not None:
            raise UsageError("a cascade cannot work on a picture", remedy="sample with one of its stages")
        if options.preview_every:
            raise UsageError("a cascade has no previews", remedy="leave --preview-every out")
        base = self._base_config(config)
        checks: list[Callable[[], None]] = [partial(self._base.check, requests, base, noise)]
        checks += [upscaling.check for upscaling in self._upscalings(config, options)]
        for stage, check in zip(self.family.stages, checks, strict=True):
            try:
                check()
            except UsageError as error:
                raise UsageError(f"stage '{stage.name}': {error.what}", error.cause, error.remedy) from error

    def _generate(
        self,
        requests: Requests,
        config: SamplingConfig,
        noise: Tensor | None,
        reporter: Reporter,
        options: SampleOptions,
    ) -> Iterator[GeneratedImage]:
        """See `PicturePipeline`."""
        pipeline: PicturePipeline = self._base
        for upscaling in self._upscalings(config, options):
            pipeline = UpscaledPipeline(pipeline, upscaling)
        plain = SampleOptions(weighted=options.weighted, on_nonfinite=options.on_nonfinite)
        yield from pipeline.generate(requests, self._base_config(config), noise, reporter, plain)


def _settings(stage: Stage, cascade: Cascade) -> StageConfig:
    """How a stage samples.

    Raises:
        CheckpointError: its settings are not those of a stage.
    """
    try:
        return StageConfig.from_mapping(dict(stage.settings))
    except ValidationError as error:
        cause = f"stages.{stage.name}: " + "; ".join(causes(error))
        raise CheckpointError(f"cannot use '{cascade.folder}'", cause, f"correct {INDEX_NAME}") from error
