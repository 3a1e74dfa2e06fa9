"""`ldm sample`: pictures from prompts, and from other pictures."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm_cli.core.compiling import NOTICE
from ldm_cli.core.diffusion.config import GuidanceConfig
from ldm_cli.errors import CheckpointError, InputNotFoundError, UsageError
from ldm_cli.formats.weight_files import refuse_foreign_content, tensors_sha256
from ldm_cli.pictures.images import slug
from ldm_cli.pictures.job import Item, Job, plan_job
from ldm_cli.pictures.job_folder import GRID, JobFolder
from ldm_cli.pictures.progress import PartOfProgress
from ldm_cli.pictures.provenance import check_repeatable
from ldm_cli.pictures.sheets import Sheets
from ldm_cli.pictures.wildcards import Wildcards
from ldm_cli.pictures.writer import written_meanwhile
from ldm_cli.recipe.schema import SampleRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.denoising import plan, sampler_of
from ldm_cli.sampling.edit_config import EditConfig
from ldm_cli.sampling.edit_input import Canvas, open_canvas
from ldm_cli.sampling.guidance_models import guide_hashes, with_absolute_paths
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.sample_options import Extras
from ldm_cli.stages.support.options import RunOptions, resolve_device
from ldm_cli.storage import storage_errors
from ldm_cli.training.distributed import Ranks, joined, local_rank
from ldm_cli.training.run_lock import RunLock

_SECONDS_OF_SILENCE = 60.0
_MOST_TOGETHER = 256
# What changes no picture, or stands in the record of each picture by itself.
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


def run(
    recipe: SampleRecipe,
    options: RunOptions,
    reporter: Reporter,
    latents: Latents | None = None,
    repeated: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Draw the pictures of a recipe into a folder; those that are there already are left alone.

    Args:
        recipe: model, prompts, sampler.
        options: where and on what.
        reporter: hears of progress.
        latents: initial noise, if not that of the seeds.
        repeated: the record of the picture that the recipe was made of: what it was drawn with must be the same.

    Returns:
        `out`, `grid`, `animations`, `images` (path, prompt and seed of each), `drawn`, `seconds`.

    Raises:
        UsageError: no prompts, or sizes, steps or latents that do not fit the model.
        InputNotFoundError, CheckpointError, DataError: the model, a picture or the latents cannot be used.
        OutputError, StorageError: the folder holds another job, is in use, or cannot be written.
    """
    if not recipe.prompts:
        raise UsageError("no prompts", remedy="give -p TEXT, --prompts FILE, or prompts in the recipe")
    job = plan_job(recipe.prompts, recipe.sampling, recipe.edit, recipe.variation, recipe.interpolate, recipe.xy)
    if recipe.wildcards is not None:
        job = Wildcards(Path(recipe.wildcards)).filled_in(job)
    device = resolve_device(options.device, local_rank())
    with joined(device, _SECONDS_OF_SILENCE) as ranks:
        pipeline = Pipeline.load(
            Path(recipe.model), device, recipe.sampling.precision, compiled=recipe.sampling.compile
        )
        if recipe.sampling.compile:
            reporter.info(NOTICE)
        desk = _Desk(pipeline, recipe, latents, len(job.items))
        desk.check(job.items)
        if repeated is not None:
            check_repeatable(desk.shared, repeated, reporter.warn)
        images = [desk.record(item, i) for i, item in enumerate(job.items)]
        out = options.out or (Path(recipe.out) if recipe.out else default_folder(desk.shared, images))
        folder = JobFolder(out, desk.shared, images, desk.sources, f".{recipe.format}", recipe.metadata)
        lock = RunLock(folder.path / ".lock")
        started = time.monotonic()
        try:
            missing = json.loads(ranks.from_first(json.dumps(_claimed(folder, lock, options, reporter, ranks))))
            animations = _draw(desk, job, folder, missing, reporter, ranks)
        finally:
            lock.release()
    return {
        "out": str(folder.path),
        "grid": str(folder.path / GRID),
        **({"animations": [str(path) for path in animations]} if animations else {}),
        "images": [
            {"file": str(folder.file(i)), "prompt": m["prompt"], "seed": m["seed"]} for i, m in enumerate(images)
        ],
        "drawn": len(missing),
        "seconds": round(time.monotonic() - started, 3),
    }


def _claimed(folder: JobFolder, lock: RunLock, options: RunOptions, reporter: Reporter, ranks: Ranks) -> list[int]:
    """What is to be drawn; the first rank locks the folder and finds out."""
    if not ranks.is_first:
        return []
    folder.make()
    with storage_errors(folder.path):
        lock.acquire(reporter.warn)
    return folder.claim(options.overwrite)


def _draw(
    desk: _Desk, job: Job, folder: JobFolder, missing: Sequence[int], reporter: Reporter, ranks: Ranks
) -> list[Path]:
    """Draw this rank's share of what is missing; the first one draws sheets, too, and gets the animations."""
    sheets = Sheets(folder, job)

    def write(index: int, pixels: Tensor) -> None:
        folder.add(pixels, index)
        if ranks.is_first:
            sheets.refresh()

    try:
        with written_meanwhile(write) as hand_over:
            for index, pixels in desk.drawn(job.items, missing[ranks.rank :: ranks.world_size], reporter, sheets):
                hand_over(index, pixels)
        ranks.wait()
        if not ranks.is_first:
            return []
        sheets.write_grid()
        return sheets.write_animations()
    finally:
        sheets.remove_preview()


def default_folder(job: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> Path:
    """`samples/PROMPT-HASH`: the same for the same job, so that repeating the command completes it, and else new."""
    content = json.dumps([job, images], sort_keys=True)
    return Path("samples") / f"{slug(images[0]['prompt'])}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


class _Desk:
    """Everything that drawing needs: the model, the pictures to work on, the initial noise."""

    def __init__(self, pipeline: Pipeline, recipe: SampleRecipe, latents: Latents | None, num_images: int) -> None:
        self.pipeline, self.recipe = pipeline, recipe
        self._canvases: dict[tuple[EditConfig, int | None, int | None], Canvas] = {}
        self._guides: dict[GuidanceConfig, dict[str, str]] = {}
        self._latents, self._noise = latents, None
        factor = pipeline.vae.downscale_factor
        if recipe.tile is not None and recipe.tile < 2 * factor:
            raise UsageError(f"tile={recipe.tile} px is too small", remedy=f"give {2 * factor} or more")
        self._window = None if recipe.tile is None else recipe.tile // factor
        if latents is not None:
            shape = pipeline.latent_shape(self._sized(recipe.sampling, self._canvas(recipe.sampling, recipe.edit)))
            self._noise = _read_latents(latents, num_images, shape)

    @property
    def sources(self) -> dict[str, str]:
        """Absolute paths of all that a picture was drawn from."""
        paths = {"model": self.pipeline.folder, "latents": self._latents.file if self._latents else None}
        paths |= {name: getattr(self.recipe.edit, name) for name in ("image", "mask", "style")}
        return {n: str(Path(p).expanduser().absolute()) for n, p in paths.items() if p is not None}

    def check(self, items: Sequence[Item]) -> None:
        """Find out before drawing that sizes, steps and pictures can be."""
        for sampling, edit in {(item.sampling, item.edit): None for item in items}:
            for name in ("precision", "compile"):
                asked, shared = getattr(sampling, name), getattr(self.recipe.sampling, name)
                if asked != shared:
                    raise UsageError(
                        f"{name}={asked} for some pictures",
                        f"the model is loaded once, with {name}={shared}",
                        "draw them by a command of their own",
                    )
            sized = self._sized(sampling, self._canvas(sampling, edit))
            self.pipeline.image_size(sized)
            plan(self.pipeline.schedule, self.pipeline.settings, sized)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What decides all pictures of the job, as JSON."""
        record: dict[str, Any] = {
            "sampling": self._sampling_record(self.recipe.sampling, self.recipe.edit),
            # But its sampler, of which `sampling` says whether it is the one.
            "scheduler": {n: value for n, value in vars(self.pipeline.settings).items() if n != "sampler"},
            "weights": self.pipeline.weights_sha256,
            "weighted_words": self.recipe.weighted_words,
        }
        if self.recipe.edit.image is not None:
            record["edit"] = self._edit_record(self.recipe.edit)
        if self.recipe.tile is not None:
            record["tile"] = self.recipe.tile
        if guides := self._guide_hashes(self.recipe.sampling):
            record["guides"] = guides
        if self._latents is not None:
            record["latents_sha256"] = tensors_sha256([self._latents.file])
        return record

    def record(self, item: Item, index: int) -> dict[str, Any]:
        """What decides one picture beside that, as JSON."""
        own: dict[str, Any] = {"prompt": item.request.prompt, "seed": item.request.seed}
        if item.request.blend is not None:
            own["blend"] = item.request.blend.to_mapping()
        sampling = self._sampling_record(item.sampling, item.edit)
        if sampling != self.shared["sampling"]:
            own["sampling"] = sampling
        if item.edit.image is not None and self._edit_record(item.edit) != self.shared["edit"]:
            own["edit"] = self._edit_record(item.edit)
        if self._guide_hashes(item.sampling) != self.shared.get("guides", {}):
            own["guides"] = self._guide_hashes(item.sampling)
        if self._latents is not None:
            own["latents_row"] = index if self._latents.row is None else self._latents.row
        return own

    def drawn(
        self, items: Sequence[Item], indices: Sequence[int], reporter: Reporter, sheets: Sheets
    ) -> Iterator[tuple[int, Tensor]]:
        """Draw some of the pictures; yields the index and the pixels of each."""
        with reporter.progress("drawing", len(indices), unit="image") as progress:
            done = 0
            for part in _alike(items, indices):
                sampling, edit = items[part[0]].sampling, items[part[0]].edit
                canvas = self._canvas(sampling, edit)
                extras = Extras(
                    canvas=canvas,
                    window=self._window,
                    weighted=self.recipe.weighted_words,
                    preview_every=self.recipe.preview_every,
                    on_preview=sheets.write_preview,
                )
                noise = None if self._noise is None else self._noise[part]
                requests = [items[i].request for i in part]
                inner = PartOfProgress(reporter, progress, done)
                for image in self.pipeline.generate(requests, self._sized(sampling, canvas), noise, inner, extras):
                    yield part[image.index], image.pixels
                done += len(part)

    def _canvas(self, sampling: SamplingConfig, edit: EditConfig) -> Canvas | None:
        """The picture to work on, read once."""
        if edit.image is None:
            return None
        key = (edit, sampling.width, sampling.height)
        if key not in self._canvases:
            factor, given = self.pipeline.vae.downscale_factor, (sampling.height, sampling.width)
            size = None if None in given else self.pipeline.image_size(sampling)
            self._canvases[key] = open_canvas(edit, factor, size)
        return self._canvases[key]

    def _sized(self, sampling: SamplingConfig, canvas: Canvas | None) -> SamplingConfig:
        """With the size of the picture, which is that of the canvas where there is one."""
        height, width = self.pipeline.image_size(sampling) if canvas is None else canvas.pixels.shape[1:]
        return sampling.model_copy(update={"height": height, "width": width})

    def _sampling_record(self, sampling: SamplingConfig, edit: EditConfig) -> dict[str, Any]:
        """The configuration as JSON; sizes only as far as they do not follow from the picture to work on."""
        sized = sampling if edit.image is not None else self._sized(sampling, None)
        guidance = with_absolute_paths(sampling.guidance).to_mapping()
        recorded = sized.to_mapping() | {"sampler": sampler_of(self.pipeline.settings, sampling), "guidance": guidance}
        if not sampling.compile:  # as it was recorded before there was a choice
            del recorded["compile"]
        return {name: value for name, value in recorded.items() if name not in _NOT_RECORDED}

    def _guide_hashes(self, sampling: SamplingConfig) -> dict[str, str]:
        """Hashes of the further networks of its guidance, computed once."""
        if sampling.guidance not in self._guides:
            self._guides[sampling.guidance] = guide_hashes(sampling.guidance)
        return self._guides[sampling.guidance]

    def _edit_record(self, edit: EditConfig) -> dict[str, Any]:
        """The work on a picture as JSON, contents in place of paths."""
        record = edit.to_mapping() | {"strength": edit.resolved_strength}
        for name in ("image", "mask", "style"):
            path = record.pop(name)
            record[f"{name}_sha256"] = None if path is None else _file_sha256(path)
        return record


def _alike(items: Sequence[Item], indices: Sequence[int]) -> Iterator[list[int]]:
    """Indices of pictures that can be drawn together, not too many at once: text states take memory."""
    groups: dict[tuple[SamplingConfig, EditConfig], list[int]] = {}
    for i in indices:
        groups.setdefault((items[i].sampling, items[i].edit), []).append(i)
    for group in groups.values():
        yield from (group[start : start + _MOST_TOGETHER] for start in range(0, len(group), _MOST_TOGETHER))


def _file_sha256(path: str) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


def _read_latents(latents: Latents, num_images: int, shape: tuple[int, int, int]) -> Tensor:
    """Initial noise float32 [N, C, h, w]."""
    file = latents.file
    try:
        refuse_foreign_content(file)
        noise = load_file(file).get("latents")
    except FileNotFoundError as error:
        raise InputNotFoundError(f"latents '{file}' not found", remedy="check --latents") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read latents '{file}'", str(error)) from error
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
