"""The best of several candidates for a picture, by a CLIP score (Ramesh et al. 2021, section 2.6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ldm_cli import philox
from ldm_cli.core.pixels import to_signed
from ldm_cli.errors import DivergedError
from ldm_cli.families.clip_folder import open_clip
from ldm_cli.families.family import place
from ldm_cli.reporting import Figure, Progress, Reporter
from ldm_cli.sampling.guidance_models import CLIPScore
from ldm_cli.sampling.request import GeneratedImage, ImageRequest, Requests
from ldm_cli.sampling.sample_options import SampleOptions

Generate = Callable[[Requests, Reporter, SampleOptions], Iterator[GeneratedImage]]


class Reranker:
    """Chooses among candidates by the cosine similarity of a CLIP's features of picture and prompt.

    Raises:
        InputNotFoundError, CheckpointError: the CLIP cannot be read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._score, self._device = CLIPScore(*open_clip(folder)), device
        place(device, torch.float32, self._score.model)

    @torch.inference_mode()
    def best(
        self,
        generate: Generate,
        requests: Requests,
        num_candidates: int,
        reporter: Reporter,
        options: SampleOptions,
    ) -> Iterator[GeneratedImage]:
        """The best candidate for each request; the first candidate is the picture of the request itself.

        The candidates of a request are generated and scored together, so that the choice depends on it alone.
        """
        with reporter.progress("sampling", len(requests), unit="image") as progress:
            for number, request in enumerate(requests):
                failures: list[DivergedError] = []
                own = replace(options, on_nonfinite=failures.append)
                inner = _Inner(reporter, progress, number)
                found = list(generate(candidates(request, num_candidates), inner, own))
                progress.update(number + 1)
                if not found:
                    options.on_nonfinite(failures[0])
                    continue
                pictures = to_signed(torch.stack([image.pixels for image in found]), self._device)
                scores = self._score.of([request.prompt] * len(found), lambda images: images)(pictures)
                yield GeneratedImage(number, request, found[int(scores.argmax())].pixels)


def candidates(request: ImageRequest, count: int) -> list[ImageRequest]:
    """The request, and others like it whose seeds are made of its own."""
    seeds = [philox.key(request.seed, f"candidate {number}")[0] for number in range(1, count)]
    return [request, *(replace(request, seed=seed) for seed in seeds)]


class _Inner:
    """A reporter of the candidates for one picture: messages are passed on, and figures, but no count."""

    def __init__(self, reporter: Reporter, progress: Progress, number: int) -> None:
        self.info, self.warn, self._progress, self._number = reporter.info, reporter.warn, progress, number

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0, unit: str = "step") -> Iterator[Progress]:
        """The progress of the job."""
        yield self

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """Figures of the picture that is being generated."""
        self._progress.update(self._number, figures)
