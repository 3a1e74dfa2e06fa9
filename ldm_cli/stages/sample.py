"""`ldm sample`: pictures from prompts, and from other pictures."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_cli.errors import DivergedError, InputNotFoundError, UsageError
from ldm_cli.families.open_family import open_family
from ldm_cli.pictures.images import slug
from ldm_cli.pictures.job import Job, make_job
from ldm_cli.pictures.job_folder import GRID, JobFolder
from ldm_cli.pictures.job_warnings import job_warnings
from ldm_cli.pictures.prompt_adapters import LoraFiles
from ldm_cli.pictures.provenance import check_repeatable
from ldm_cli.pictures.sheets import Sheets
from ldm_cli.pictures.wildcards import Wildcards
from ldm_cli.pictures.writer import written_meanwhile
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.job_adapters import JobAdapters
from ldm_cli.stages.support.job_image_prompts import open_image_prompts
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions, resolve_device, settled
from ldm_cli.stages.support.picture_generator import Latents, PictureGenerator
from ldm_cli.stages.support.upscaler import open_pipeline
from ldm_cli.storage import storage_errors
from ldm_cli.training.distributed import SECONDS_OF_SILENCE, joined, local_rank
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_lock import RunLock


def run(
    recipe: SampleRecipe,
    options: RunOptions,
    reporter: Reporter,
    latents: Latents | None = None,
    repeated: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Generate the pictures of a recipe into a folder; those that exist are left alone.

    Args:
        latents: initial noise, if not that of the seeds.
        repeated: the provenance of the picture that the recipe was made of: model and inputs must be the same.

    Returns:
        `out`, `grid`, `animations`, `images` (path, prompt and seed of each), `generated` (how many), `seconds`.

    Raises:
        UsageError: no prompts, or sizes, steps or latents that do not fit the model.
        InputNotFoundError, CheckpointError, DataError: the model, a picture or the latents cannot be used.
        OutputError, StorageError: the folder holds another job, is in use, or cannot be written.
        DivergedError: pictures are not finite; all others are written.
    """
    if not recipe.prompts:
        raise UsageError("no prompts", remedy="give -p TEXT, --prompts FILE, or prompts in the recipe")
    recipe = with_model_folders(recipe, reporter)
    if repeated is not None and not _first_model(recipe).exists():
        remedy = f"a picture holds no more than its name: add {'--model' if recipe.model else '--upscale'} DIR"
        raise InputNotFoundError(f"model '{_first_model(recipe)}' not found", remedy=remedy)
    loras = LoraFiles(recipe.loras, None if recipe.lora_dir is None else Path(recipe.lora_dir))
    job, device = _job(recipe, loras), resolve_device(options.device, local_rank())
    with joined(device, SECONDS_OF_SILENCE) as ranks:
        sampling = settled(recipe.sampling, len(job.items), device, reporter.info)
        recipe = recipe.model_copy(update={"sampling": sampling})
        job = _job(recipe, loras)
        family = open_family(_first_model(recipe), device, sampling.precision, compiled=sampling.compile is True)
        adapters = JobAdapters(family, job.items, loras.paths, recipe.embeddings)
        image_prompts = open_image_prompts(family, job.items, recipe.image_prompts)
        pipeline = open_pipeline(recipe, family)
        generator = PictureGenerator(pipeline, recipe, latents, len(job.items), adapters, image_prompts)
        generator.check(job.items)
        for message in job_warnings(job.items, family, recipe.weighted_words, recipe.tile):
            reporter.warn(message)
        if repeated is not None:
            check_repeatable(generator.shared, repeated, reporter.warn)
        images = [generator.provenance(item, i) for i, item in enumerate(job.items)]
        out = options.out or (Path(recipe.out) if recipe.out else default_folder(generator.shared, images))
        folder = JobFolder(out, generator.shared, images, generator.sources, f".{recipe.format}", recipe.metadata)
        lock = RunLock(folder.path / ".lock")
        started = time.monotonic()
        try:
            missing = json.loads(ranks.from_first(json.dumps(_claimed(folder, lock, options, reporter, ranks))))
            animations, failures = _generate(generator, job, folder, missing, reporter, ranks)
        finally:
            lock.release()
    if failures:
        raise _of_several(failures, len(missing))
    result = _result(folder, images, animations)
    return result | {"generated": len(missing), "seconds": round(time.monotonic() - started, 3)}


def _first_model(recipe: SampleRecipe) -> Path:
    return Path(recipe.model or ("" if recipe.upscale is None else recipe.upscale.model))


def _job(recipe: SampleRecipe, loras: LoraFiles) -> Job:
    job = make_job(recipe.prompts, recipe.sampling, recipe.edit, recipe.variation, recipe.interpolate, recipe.xy)
    return loras.read_tags(job if recipe.wildcards is None else Wildcards(Path(recipe.wildcards)).filled_in(job))


def _result(folder: JobFolder, images: Sequence[Mapping[str, Any]], animations: Sequence[Path]) -> dict[str, Any]:
    """The paths of a job's files."""
    return {
        "out": str(folder.path),
        "grid": str(folder.path / GRID),
        **({"animations": [str(path) for path in animations]} if animations else {}),
        "images": [
            {"file": str(folder.file(i)), "prompt": m["prompt"], "seed": m["seed"]} for i, m in enumerate(images)
        ],
    }


def _claimed(folder: JobFolder, lock: RunLock, options: RunOptions, reporter: Reporter, ranks: Ranks) -> list[int]:
    """Indices of the missing pictures; found by the first rank, which locks the folder."""
    if not ranks.is_first:
        return []
    folder.make()
    with storage_errors(folder.path):
        lock.acquire(reporter.warn)
    return folder.claim(options.overwrite, reporter.warn)


def _generate(
    generator: PictureGenerator, job: Job, folder: JobFolder, missing: Sequence[int], reporter: Reporter, ranks: Ranks
) -> tuple[list[Path], list[DivergedError]]:
    """Generate this rank's share of the missing pictures; the first rank also writes sheets.

    Returns:
        The animations, and an error for each picture of any rank that is not finite.
    """
    sheets = Sheets(folder, job)
    failures: list[DivergedError] = []

    def leave_out(error: DivergedError) -> None:
        failures.append(error)
        reporter.warn(f"{error.what}: {error.cause}")

    def write(index: int, pixels: Tensor) -> None:
        folder.add(pixels, index)
        if ranks.is_first:
            sheets.refresh()

    try:
        with written_meanwhile(write) as hand_over:
            share = missing[ranks.rank :: ranks.world_size]
            for index, pixels in generator.generate(job.items, share, reporter, sheets.write_preview, leave_out):
                hand_over(index, pixels)
        own = json.dumps([(error.what, error.cause, error.remedy) for error in failures])
        failures = [DivergedError(*texts) for text in ranks.texts(own) for texts in json.loads(text)]
        if not ranks.is_first or len(folder.missing()) == len(job.items):
            return [], failures
        sheets.write_grid()
        return sheets.write_animations(), failures
    finally:
        sheets.remove_preview()


def _of_several(failures: Sequence[DivergedError], num_pictures: int) -> DivergedError:
    """One error for the pictures of a job that are not finite."""
    if len(failures) == 1:
        return failures[0]
    named = "; ".join(error.what for error in failures[:5]) + ("; …" if len(failures) > 5 else "")
    cause = f"{named}: {failures[0].cause}"
    return DivergedError(f"{len(failures)} of {num_pictures} pictures are not finite", cause, failures[0].remedy)


def default_folder(job: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> Path:
    """`samples/PROMPT-HASH`: the same for the same job, so that the same command completes it."""
    content = json.dumps([job, images], sort_keys=True)
    return Path("samples") / f"{slug(images[0]['prompt'])}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
