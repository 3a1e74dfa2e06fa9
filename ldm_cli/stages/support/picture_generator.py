"""The pictures of a job: generated with a model and its inputs, whose provenance is recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.codec import Codec
from ldm_cli.core.diffusion.config import GuidanceConfig
from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.families.codec_folder import open_codec
from ldm_cli.families.family import ImageGenerator, place
from ldm_cli.families.open_family import resolve_model
from ldm_cli.formats.hub import recorded
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.formats.weight_files import read_tensors, tensors_sha256
from ldm_cli.pictures.job import Item, errors_at
from ldm_cli.pictures.progress import PartOfProgress
from ldm_cli.pictures.provenance import UPSCALER, edit_provenance, embedding_source, lora_source, picture_sources
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_config import EditConfig
from ldm_cli.sampling.edit_input import EditInput, open_edit_input
from ldm_cli.sampling.embedded_pictures import embedded_pictures
from ldm_cli.sampling.guidance_models import guidance_folders, with_absolute_paths
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.sample_options import OnNonfinite, OnPreview, SampleOptions, TextDifference
from ldm_cli.stages.support.job_adapters import JobAdapters
from ldm_cli.stages.support.job_image_prompts import JobImagePrompts

_MOST_TOGETHER = 256
# Fields that change no picture, or that the provenance of each picture holds by itself.
_NOT_RECORDED = ("batch_size", "images_per_prompt", "seed")


@dataclass(frozen=True)
class Latents:
    """Initial noise from a file: float32 [N, C, h, w], one row per picture of the job.

    Attributes:
        file: safetensors with `latents`.
        row: the only row to take, for the only picture; None: all, in order.
    """

    file: Path
    row: int | None = None


class PictureGenerator:
    """The model of a job, its adapters, the pictures to work on and the initial noise."""

    def __init__(
        self,
        pipeline: PicturePipeline,
        recipe: SampleRecipe,
        latents: Latents | None,
        num_images: int,
        adapters: JobAdapters,
        image_prompts: JobImagePrompts | None = None,
    ) -> None:
        self.pipeline, self.recipe, self._adapters, self._image_prompts = pipeline, recipe, adapters, image_prompts
        self._edit_inputs: dict[tuple[EditConfig, int | None, int | None], EditInput] = {}
        self._embeddings: dict[tuple[str, ...], Tensor] = {}
        self._hashes: dict[GuidanceConfig, dict[str, str]] = {}
        self._sha256 = cache(weights_sha256)
        self._latents, self._noise = latents, None
        factor = pipeline.family.codec.factor
        if recipe.tile is not None and recipe.tile < 2 * factor:
            raise UsageError(f"tile={recipe.tile} px is too small", remedy=f"give {2 * factor} or more")
        self._window = None if recipe.tile is None else recipe.tile // factor
        self._preview_codec = (
            None if recipe.preview_vae is None else _preview_codec(recipe.preview_vae, pipeline.family)
        )
        if latents is not None:
            shape = pipeline.latent_shape(self._sized(recipe.sampling, self._edit_input(recipe.sampling, recipe.edit)))
            self._noise = _read_latents(latents, num_images, shape)

    @property
    def sources(self) -> dict[str, str]:
        """Absolute paths of the model, or its name on the hub, and of the files that the pictures are made of."""
        latents = self._latents.file if self._latents else None
        paths: dict[str, str | Path | None] = {"model": self.pipeline.family.folder, "latents": latents}
        paths |= {name: getattr(self.recipe.edit, name) for name in ("image", "mask", "style")}
        paths |= picture_sources(self.recipe.edit.embedded)
        if self.recipe.upscale is not None and self.recipe.model:
            paths[UPSCALER] = Path(self.recipe.upscale.model)
        paths |= {lora_source(name): path for name, path in self._adapters.paths.items()}
        paths |= {embedding_source(word): path for word, path in self._adapters.embeddings.items()}
        paths |= {} if self._image_prompts is None else self._image_prompts.sources
        return {n: recorded(Path(p).expanduser().absolute()) for n, p in paths.items() if p is not None}

    def check(self, items: Sequence[Item]) -> None:
        """Find impossible sizes, steps and pictures before anything is generated.

        Raises:
            UsageError: naming them.
        """
        for sampling in {item.sampling: None for item in items}:
            for name in ("precision", "compile"):
                asked, shared = getattr(sampling, name), getattr(self.recipe.sampling, name)
                if asked != shared:
                    raise UsageError(
                        f"{name}={asked} for some pictures",
                        f"the model is loaded once, with {name}={shared}",
                        "give them a command of their own",
                    )
        for part in _alike(items, range(len(items))):
            first, noise = items[part[0]], None if self._noise is None else self._noise[part]
            is_as_all = (first.sampling, first.edit) == (self.recipe.sampling, self.recipe.edit)
            with errors_at("" if is_as_all else first.place):
                self._check_alike([items[i].request for i in part], first, noise)

    def _check_alike(self, requests: Sequence[ImageRequest], first: Item, noise: Tensor | None) -> None:
        """`check` of pictures that differ from the first one in prompt and seed alone."""
        for name in self.pipeline.meaningless_edit:
            if getattr(first.edit, name) != getattr(EditConfig(), name):
                raise UsageError(f"edit.{name} has no meaning for this model", remedy="leave it out")
        options = self._options(first.sampling, first.edit)
        self.pipeline.check(requests, self._sized(first.sampling, options.edit_input), noise, options)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """The provenance that all pictures of the job share, as JSON."""
        provenance: dict[str, Any] = {
            "sampling": self._sampling_provenance(self.recipe.sampling, self.recipe.edit),
            **self.pipeline.facts,
            "weights": self.pipeline.family.weights_sha256,
            "weighted_words": self.recipe.weighted_words,
        }
        if self.recipe.edit.is_given:
            provenance["edit"] = edit_provenance(self.recipe.edit, self.pipeline.meaningless_edit)
        if self.recipe.variant is not None:
            provenance["variant"] = self.recipe.variant
        if self.recipe.tile is not None:
            provenance["tile"] = self.recipe.tile
        if hashes := self._guidance_hashes(self.recipe.sampling):
            provenance["guidance_models"] = hashes
        if self._adapters.embeddings:
            provenance["embedding_sha256"] = self._adapters.embedding_sha256
        if self._adapters.sha256:
            provenance["lora_sha256"] = self._adapters.sha256
        if self._image_prompts is not None:
            provenance["image_prompts"] = self._image_prompts.provenance
        if self._latents is not None:
            provenance["latents_sha256"] = tensors_sha256([self._latents.file])
        return provenance

    def provenance(self, item: Item, index: int) -> dict[str, Any]:
        """The provenance that one picture has beside `shared`, as JSON."""
        own: dict[str, Any] = {"prompt": item.request.prompt, "seed": item.request.seed}
        if item.loras:
            own["loras"] = dict(item.loras)
        if item.request.blend is not None:
            own["blend"] = item.request.blend.to_mapping()
        sampling = self._sampling_provenance(item.sampling, item.edit)
        if sampling != self.shared["sampling"]:
            own["sampling"] = sampling
        if item.edit.is_given and edit_provenance(item.edit, self.pipeline.meaningless_edit) != self.shared["edit"]:
            own["edit"] = edit_provenance(item.edit, self.pipeline.meaningless_edit)
        if self._guidance_hashes(item.sampling) != self.shared.get("guidance_models", {}):
            own["guidance_models"] = self._guidance_hashes(item.sampling)
        if self._latents is not None:
            own["latents_row"] = index if self._latents.row is None else self._latents.row
        return own

    def generate(
        self,
        items: Sequence[Item],
        indices: Sequence[int],
        reporter: Reporter,
        on_preview: OnPreview,
        on_nonfinite: OnNonfinite,
    ) -> Iterator[tuple[int, Tensor]]:
        """Generate some of the pictures; yields the index and the pixels of each that is finite."""
        with reporter.progress("sampling", len(indices), unit="image") as progress:
            done = 0
            for part in _alike(items, indices):
                self._adapters.use_for(items[part[0]])
                if self._image_prompts is not None:
                    self._image_prompts.use_for(items[part[0]])
                sampling, edit = items[part[0]].sampling, items[part[0]].edit
                options = replace(self._options(sampling, edit), on_preview=on_preview, on_nonfinite=on_nonfinite)
                sized = self._sized(sampling, options.edit_input)
                noise = None if self._noise is None else self._noise[part]
                requests = [items[i].request for i in part]
                inner = PartOfProgress(reporter, progress, done)
                for image in self.pipeline.generate(requests, sized, noise, inner, options):
                    yield part[image.index], image.pixels
                done += len(part)

    def _options(self, sampling: SamplingConfig, edit: EditConfig) -> SampleOptions:
        difference = None
        if edit.from_text is not None and edit.to_text is not None:
            difference = TextDifference(edit.from_text, edit.to_text, edit.amount)
        return SampleOptions(
            edit_input=self._edit_input(sampling, edit),
            image_embeds=self._embedded(edit.embedded) if edit.embedded else None,
            text_difference=difference,
            image_tokens=None if self._image_prompts is None else self._image_prompts.tokens,
            window=self._window,
            weighted=self.recipe.weighted_words,
            preview_every=self.recipe.preview_every,
            preview_codec=self._preview_codec,
        )

    def _edit_input(self, sampling: SamplingConfig, edit: EditConfig) -> EditInput | None:
        """The picture to work on, read once."""
        if edit.image is None:
            return None
        key = (edit, sampling.width, sampling.height)
        if key not in self._edit_inputs:
            multiple, given = self.pipeline.multiple, (sampling.height, sampling.width)
            size = None if None in given else self.pipeline.image_size(sampling)
            self._edit_inputs[key] = open_edit_input(edit, multiple, size)
        return self._edit_inputs[key]

    def _embedded(self, names: tuple[str, ...]) -> Tensor:
        """The embeddings of pictures, [1, K, E], computed once."""
        if names not in self._embeddings:
            self._embeddings[names] = embedded_pictures(self.pipeline.family, names)
        return self._embeddings[names]

    def _sized(self, sampling: SamplingConfig, edit_input: EditInput | None) -> SamplingConfig:
        """With the size of the picture, which is that of the picture to work on where there is one."""
        height, width = self.pipeline.image_size(sampling) if edit_input is None else edit_input.pixels.shape[1:]
        return sampling.model_copy(update={"height": height, "width": width})

    def _sampling_provenance(self, sampling: SamplingConfig, edit: EditConfig) -> dict[str, Any]:
        """The configuration as JSON; without sizes that follow from the picture to work on."""
        sized = sampling if edit.image is not None else self._sized(sampling, None)
        guidance = with_absolute_paths(sampling.guidance)
        recorded = self.pipeline.recorded(sized.model_copy(update={"guidance": guidance}))
        return {name: value for name, value in recorded.items() if name not in _NOT_RECORDED}

    def _guidance_hashes(self, sampling: SamplingConfig) -> dict[str, str]:
        """Hex sha256 of the weights of each further network of the guidance; each folder is read once."""
        if sampling.guidance not in self._hashes:
            folders = guidance_folders(sampling.guidance, self.pipeline.family)
            self._hashes[sampling.guidance] = {name: self._sha256(folder) for name, folder in folders.items()}
        return self._hashes[sampling.guidance]


def _preview_codec(folder: str, family: ImageGenerator) -> Codec:
    """The autoencoder of a folder, for the latents of a family.

    Raises:
        UsageError: it has other latents.
        InputNotFoundError, CheckpointError: it cannot be read.
    """
    codec = open_codec(resolve_model(Path(folder)))
    ours, theirs = ((one.channels, one.factor) for one in (family.codec, codec))
    if ours != theirs:
        shapes = [f"{channels} channels at 1/{factor} of the size" for channels, factor in (theirs, ours)]
        raise UsageError(f"preview_vae '{folder}' cannot be used", f"its latents have {shapes[0]}, not {shapes[1]}")
    place(family.device, torch.float32, codec)
    return codec


def _alike(items: Sequence[Item], indices: Sequence[int]) -> Iterator[list[int]]:
    """Indices of pictures that one call of the pipeline generates; not too many, for conditions take memory."""
    groups: dict[Item, list[int]] = {}
    for i in indices:
        groups.setdefault(replace(items[i], request=ImageRequest("", 0)), []).append(i)
    for group in groups.values():
        yield from (group[start : start + _MOST_TOGETHER] for start in range(0, len(group), _MOST_TOGETHER))


def _read_latents(latents: Latents, num_images: int, shape: tuple[int, int, int]) -> Tensor:
    """Initial noise float32 [N, C, h, w]."""
    file = latents.file
    noise = read_tensors(file).get("latents")
    if noise is None:
        raise CheckpointError(f"cannot use latents '{file}'", "it has no tensor named 'latents'")
    noise = noise if latents.row is None else noise[latents.row : latents.row + 1]
    expected = (num_images, *shape)
    if tuple(noise.shape) != expected:
        raise UsageError(
            f"latents '{file}' do not fit",
            f"their shape is {tuple(noise.shape)}, {expected} expected: one per image, prompt by prompt",
            "change --latents, -n, --size or the prompts",
        )
    if not bool(torch.isfinite(noise).all()):
        raise CheckpointError(f"cannot use latents '{file}'", "some values are not finite")
    return noise.float()
