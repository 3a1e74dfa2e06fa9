"""From prompts to pictures, token by token: guidance on logits, a key/value cache, known parts of a picture.

Letters: N pictures, R rows (N, or 2N with guidance), L tokens of a prompt, K codes, P = h·w places of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm_cli import philox
from ldm_cli.core.models.llama import KeyValueCache
from ldm_cli.errors import DivergedError, UsageError
from ldm_cli.families.autoregressive import Autoregressive
from ldm_cli.families.prompt_weights import parse_weights
from ldm_cli.reporting import Progress, Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_input import EditInput, latent_mask
from ldm_cli.sampling.fixed_rows import TOKEN_ROWS, enough_rows, row_groups
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.pixels import decode_pixels, encode_pixels
from ldm_cli.sampling.request import GeneratedImage, ImageRequest, Requests
from ldm_cli.sampling.sample_options import PLAIN, SampleOptions
from ldm_cli.sampling.token_choice import chosen_tokens


class TokenPipeline(PicturePipeline):
    """Generates pictures with an autoregressive model; random numbers are those of the seed and the place."""

    family: Autoregressive
    meaningless: ClassVar[tuple[str, ...]] = (
        *("prior", "sampler", "steps", "eta", "timestep_spacing", "timesteps", "sizes", "negative_sizes"),
        "image_scale",
        *("long_prompts", "clip_skip", "guidance.rescale", "guidance.interval", "guidance.threshold"),
        *("guidance.apg", "guidance.perturb", "guidance.model", "guidance.clip"),
    )
    hint: ClassVar[str] = (
        "it generates token by token: temperature, top_k, top_p, guidance.scale, guidance.best_of and negative "
        "change how"
    )

    def __init__(self, family: Autoregressive) -> None:
        super().__init__(family)
        self._enough: dict[tuple[int, int, bool], int] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """None."""
        return {}

    def image_size(self, config: SamplingConfig) -> tuple[int, int]:
        """See `PicturePipeline`: there is one size."""
        height, width = (side * self.family.codec.factor for side in self.family.sample_size)
        asked = config.height or height, config.width or width
        if asked != (height, width):
            size = f"{asked[1]}x{asked[0]}"
            raise UsageError(f"size {size} is not possible", f"the model's pictures are {width}x{height}")
        return height, width

    def check(
        self, requests: Requests, config: SamplingConfig, noise: Tensor | None = None, options: SampleOptions = PLAIN
    ) -> None:
        """See `PicturePipeline`."""
        super().check(requests, config, noise, options)
        self.image_size(config)
        edit = options.edit_input
        texts = [*(request.prompt for request in requests), config.negative]
        refused = {
            "--latents": noise is not None,
            "--tile": options.window is not None,
            "--preview-every": options.preview_every > 0,
            "--variation, --interpolate or blend": any(request.blend is not None for request in requests),
            "--style": edit is not None and edit.style is not None,
            "--strength": edit is not None and edit.strength < 1.0 and edit.mask is not None,
            "a weight such as (word:1.3)": options.weighted
            and any(piece.weight != 1.0 for text in texts for piece in parse_weights(text)),
        }
        if given := [name for name, is_given in refused.items() if is_given]:
            raise UsageError(f"{', '.join(given)} has no meaning for this model", self.hint, "leave it out")
        if edit is not None and edit.mask is None:
            raise UsageError("this model completes pictures", "no part is left open", "add --mask or --extend")

    @torch.inference_mode()
    def _generate(
        self,
        requests: Requests,
        config: SamplingConfig,
        noise: Tensor | None,
        reporter: Reporter,
        options: SampleOptions,
    ) -> Iterator[GeneratedImage]:
        """See `PicturePipeline`."""
        family, edit = self.family, options.edit_input
        prompts = list(dict.fromkeys([config.negative, *(request.prompt for request in requests)]))
        ids = dict(zip(prompts, family.prompt_tokens(prompts, reporter.warn), strict=True))
        known = None if edit is None else self._known_codes(edit)
        enough = None if family.is_compiled else partial(self._enough_rows, config, ids)
        groups = row_groups(len(requests), TOKEN_ROWS, family.device, config.batch_size, enough)
        with reporter.progress("sampling", len(requests), unit="image") as progress:
            for images, rows in groups:
                group = list(requests[images])
                padded = group + [group[-1]] * (rows - len(group))
                sequence = _Sequence(self, padded, config, ids)
                codes = self._codes(sequence, padded, config, known, progress, images.start)[: len(group)]
                is_finite = (codes >= 0).all(1).tolist()
                grids = codes.clamp(min=0).view(-1, 1, *family.tokens.grid)
                for i, pixels in enumerate(decode_pixels(family.codec, grids)):
                    if pixels is None or not is_finite[i]:
                        options.on_nonfinite(_nonfinite(group[i], pixels is None))
                        continue
                    yield GeneratedImage(images.start + i, group[i], pixels if edit is None else edit.pasted(pixels))
                progress.update(images.stop)

    def _codes(
        self,
        sequence: _Sequence,
        requests: Requests,
        config: SamplingConfig,
        known: Tensor | None,
        progress: Progress,
        done: int,
    ) -> Tensor:
        """Indices of codes, int64 [N, P]; −1 where logits are not finite.

        Args:
            sequence: with the prompts.
            requests: N of them; their seeds decide.
            known: indices int64 [P] of the codes that are given, −1 where one is chosen; on the CPU. None: none is.
            progress, done: receives the number of tokens, `done` pictures being complete.
        """
        num_places, count = self.family.tokens.num_places, len(requests)
        uniform = token_noise(requests, num_places, self.family.device)
        codes = torch.zeros(count, num_places, dtype=torch.int64, device=self.family.device)
        is_given = [False] * num_places if known is None else (known >= 0).tolist()
        start = is_given.index(False)
        if known is not None:
            codes[:] = known.to(self.family.device, non_blocking=True)
        logits = sequence.begin(codes[:, :start])
        for place in range(start, num_places):
            if not is_given[place]:
                codes[:, place] = chosen_tokens(logits, uniform[:, place], config)
            progress.update(done, {"tokens": f"{place + 1}/{num_places}"})
            if place + 1 < num_places:
                logits = sequence.go_on(codes[:, place].clamp(min=0))
        return codes

    def _known_codes(self, edit: EditInput) -> Tensor:
        """The codes of the places all of whose pixels stay, −1 elsewhere: int64 [P], on the CPU."""
        codec = self.family.codec
        assert edit.mask is not None
        codes = encode_pixels(codec, edit.pixels, self.family.device).flatten().cpu()
        return codes.where(latent_mask(edit.mask, codec.factor).flatten() == 0, -1)

    def _enough_rows(self, config: SamplingConfig, ids: dict[str, Tensor], count: int, size: int) -> int:
        """See `enough_rows`; the trial is the beginning of a picture."""
        question = count, size, config.guidance.scale in (0.0, 1.0)
        if question not in self._enough:

            def trial(rows: int) -> Tensor:
                sequence = _Sequence(self, [ImageRequest(config.negative, seed) for seed in range(rows)], config, ids)
                first = sequence.begin(torch.zeros(rows, 0, dtype=torch.int64, device=self.family.device))
                return torch.cat([first, sequence.go_on(torch.arange(rows, device=first.device) % first.shape[1])], 1)

            self._enough[question] = enough_rows(trial, count, size)
        return self._enough[question]

    @cached_property
    def image_head(self) -> nn.Linear:
        """The rows of the last layer that are codes."""
        tokens, weight = self.family.tokens, self.family.transformer.head_weight
        with torch.device("meta"):
            head = nn.Linear(weight.shape[1], tokens.num_codes, bias=False)
        rows = weight.detach()[tokens.image_token_offset : tokens.begin_id]
        head.weight = nn.Parameter(rows, requires_grad=False)
        return head


class _Sequence:
    """The sequences of some pictures: N with their prompts and, with guidance, N with the negative prompt."""

    def __init__(
        self, pipeline: TokenPipeline, requests: Requests, config: SamplingConfig, ids: dict[str, Tensor]
    ) -> None:
        self._family, self._head, self._scale = pipeline.family, pipeline.image_head, config.guidance.scale
        own = [ids[request.prompt] for request in requests]
        negative = [ids[config.negative]] * len(requests)
        self._copies = 1 if self._scale in (0.0, 1.0) else 2
        self._ids = torch.stack(own + negative if self._copies == 2 else own if self._scale else negative)
        transformer, tokens = self._family.transformer, self._family.tokens
        self._cache = KeyValueCache(
            transformer.config,
            len(self._ids),
            tokens.length,
            transformer.head_weight,
            is_static=self._family.is_compiled,
        )

    def begin(self, codes: Tensor) -> Tensor:
        """The guided logits [N, K] after the prompt and the first codes, int64 [N, p]."""
        tokens = self._family.tokens
        begin = torch.full_like(self._ids[:, :1], tokens.begin_id)
        return self._logits(torch.cat([self._ids, begin, self._rows(codes)], dim=1))

    def go_on(self, codes: Tensor) -> Tensor:
        """The guided logits [N, K] after one more code, int64 [N]."""
        return self._logits(self._rows(codes[:, None]))

    def _rows(self, codes: Tensor) -> Tensor:
        return (codes + self._family.tokens.image_token_offset).repeat(self._copies, 1)

    def _logits(self, ids: Tensor) -> Tensor:
        """u + s (c − u): log-probabilities differ from logits by a constant of each row, which changes nothing."""
        logits: Tensor = self._head(self._family.transformer.model(ids, self._cache)[:, -1]).float()
        if self._copies == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return torch.lerp(unconditional, conditional, self._scale)


def token_noise(requests: Requests, num_places: int, device: torch.device) -> Tensor:
    """A uniform number in (0, 1) for each place of each picture: float32 [N, P], of its seed alone."""
    words = torch.tensor([philox.key(request.seed, "sampling: tokens") for request in requests])
    first, second = words.to(device, non_blocking=True)[..., None].unbind(1)
    zeros = torch.zeros_like(first[:, 0])
    return philox.uniform((first, second), zeros, zeros, num_places)


def _nonfinite(request: ImageRequest, is_decoder: bool) -> DivergedError:
    culprit = "the VQ model" if is_decoder else "the Transformer"
    return DivergedError(
        f"the picture of {request.prompt[:60]!r} with seed {request.seed} is not finite",
        f"{culprit} gives values that are not finite",
        "set sampling.precision to bf16 or fp32, or check the weights",
    )
