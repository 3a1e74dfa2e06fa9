"""What the pipelines of all kinds of generators have in common: the contract, refused settings, the best of several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import reduce
from typing import Any, ClassVar

from torch import Tensor

from ldm_cli.errors import UsageError
from ldm_cli.families.family import ImageGenerator
from ldm_cli.reporting import Reporter, SilentReporter
from ldm_cli.sampling.best_of import Reranker
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.guidance_models import guidance_folders
from ldm_cli.sampling.request import GeneratedImage, Requests
from ldm_cli.sampling.sample_options import PLAIN, SampleOptions

_DEFAULTS = SamplingConfig()


class PicturePipeline(ABC):
    """Generates pictures with a model.

    Attributes:
        meaningless: fields of `SamplingConfig` that change nothing: only their defaults are taken.
        hint: what to set in their place.
        meaningless_edit: fields of `EditConfig`, likewise.
    """

    meaningless: ClassVar[tuple[str, ...]]
    hint: ClassVar[str]
    meaningless_edit: ClassVar[tuple[str, ...]] = ()

    def __init__(self, family: ImageGenerator) -> None:
        self.family = family
        self._rerankers: dict[str, Reranker] = {}

    @property
    def multiple(self) -> int:
        """What the sides of a picture to work on are padded to multiples of."""
        return self.family.codec.factor

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Settings of the model's files that belong to the provenance of a picture, as JSON."""

    @abstractmethod
    def image_size(self, config: SamplingConfig) -> tuple[int, int]:
        """Height and width of the pictures, in pixels.

        Raises:
            UsageError: a size that the model cannot do.
        """

    def latent_shape(self, config: SamplingConfig) -> tuple[int, int, int]:
        """C×h×w of the latents behind one picture; errors as in `image_size`."""
        height, width = self.image_size(config)
        codec = self.family.codec
        return codec.channels, height // codec.factor, width // codec.factor

    def recorded(self, config: SamplingConfig) -> dict[str, Any]:
        """The configuration as JSON, as it belongs to the provenance of a picture."""
        found = config.to_mapping()
        for path in self.meaningless:
            section, _, name = path.rpartition(".")
            del (found[section] if section else found)[name]
        return found

    def check(
        self, requests: Requests, config: SamplingConfig, noise: Tensor | None = None, options: SampleOptions = PLAIN
    ) -> None:
        """Find what `generate` cannot do, before anything is generated; arguments and errors as there."""
        for path in self.meaningless:
            value, default = (reduce(getattr, path.split("."), one) for one in (config, _DEFAULTS))
            if value != default:
                raise UsageError(f"sampling.{path} has no meaning for this model", self.hint, "leave it out")
        if config.guidance.best_of is not None and noise is not None:
            raise UsageError("--latents and --best-of do not go together", "candidates have noise of their own")

    def generate(
        self,
        requests: Requests,
        config: SamplingConfig,
        noise: Tensor | None = None,
        reporter: Reporter | None = None,
        options: SampleOptions = PLAIN,
    ) -> Iterator[GeneratedImage]:
        """Generate pictures, in the order of the requests.

        On a CPU a picture is the same bit for bit whatever the other requests and `config.batch_size` are; on other
        devices it is the same up to rounding.

        Args:
            config: guidance, size, and how the model samples.
            noise: initial noise, standard normal [N, C, h, w], one per request; None: by the seeds.
            reporter: receives progress, and warnings of prompts that are cut.
            options: a picture to work on, windows, weighted words, previews.

        Raises:
            UsageError: settings that the model cannot do.
            DivergedError: a picture is not finite, unless `options.on_nonfinite` says otherwise.
            ValueError: `noise` of another shape.
        """
        reporter = reporter or SilentReporter()
        self.check(requests, config, noise, options)
        best = config.guidance.best_of
        if best is None:
            yield from self._generate(requests, config, noise, reporter, options)
            return
        if best.clip not in self._rerankers:
            folder = guidance_folders(config.guidance, self.family)["best_of"]
            self._rerankers[best.clip] = Reranker(folder, self.family.device)
        yield from self._rerankers[best.clip].best(
            lambda some, inner, own: self._generate(some, config, None, inner, own),
            requests,
            best.candidates,
            reporter,
            options,
        )

    @abstractmethod
    def _generate(
        self,
        requests: Requests,
        config: SamplingConfig,
        noise: Tensor | None,
        reporter: Reporter,
        options: SampleOptions,
    ) -> Iterator[GeneratedImage]:
        """`generate` what has been checked, without a choice among candidates."""
