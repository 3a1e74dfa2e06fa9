"""`ldm sample`: pictures from prompts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm_cli.errors import CheckpointError, InputNotFoundError, UsageError
from ldm_cli.formats.weight_files import refuse_foreign_content, tensors_sha256
from ldm_cli.recipe.schema import SampleRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.denoising import plan
from ldm_cli.sampling.images import slug
from ldm_cli.sampling.job_folder import JobFolder
from ldm_cli.sampling.pipeline import ImageRequest, Pipeline, requests_for
from ldm_cli.stages.options import RunOptions, resolve_device


def run(
    recipe: SampleRecipe, options: RunOptions, reporter: Reporter, latents_file: Path | None = None
) -> dict[str, Any]:
    """Draw the pictures of a recipe into a folder; those that are there already are left alone.

    Args:
        recipe: model, prompts, sampler.
        options: where and on what.
        reporter: hears of progress.
        latents_file: initial noise: safetensors with `latents` [N, C, h, w], one each, prompt by prompt.

    Returns:
        `out`, `grid`, `images` (path, prompt and seed of each), `drawn`, `seconds`.

    Raises:
        UsageError: no prompts, or sizes, steps or latents that do not fit the model.
        InputNotFoundError, CheckpointError: the model or the latents cannot be used.
        OutputError, StorageError: the folder holds another job, or cannot be written.
    """
    if not recipe.prompts:
        raise UsageError("no prompts", remedy="give -p TEXT, --prompts FILE, or prompts in the recipe")
    config = recipe.sampling
    pipeline = Pipeline.load(Path(recipe.model), resolve_device(options.device), config.precision)
    height, width = pipeline.image_size(config)
    plan(pipeline.schedule, pipeline.settings, config)
    requests = requests_for(recipe.prompts, config)
    latents = (
        None if latents_file is None else _read_latents(latents_file, len(requests), pipeline.latent_shape(config))
    )

    job = {
        "sampling": _without_batch_size(config.model_copy(update={"width": width, "height": height})),
        "scheduler": vars(pipeline.settings),
        "weights": pipeline.weights_sha256,
        "latents": None if latents_file is None else tensors_sha256([latents_file]),
    }
    out = options.out or (Path(recipe.out) if recipe.out else default_folder(job, requests))
    folder = JobFolder(out, job, requests)
    missing = folder.claim(options.overwrite, {"model": str(pipeline.folder), "device": str(pipeline.device)})
    started = time.monotonic()
    chosen = None if latents is None else latents[missing]
    for image in pipeline.generate([requests[i] for i in missing], config, chosen, reporter):
        folder.add(image, missing[image.index])
    seconds = time.monotonic() - started
    grid = folder.write_grid(config.images_per_prompt)
    return {
        "out": str(folder.path),
        "grid": str(grid),
        "images": [{**image, "file": str(folder.path / str(image["file"]))} for image in folder.images],
        "drawn": len(missing),
        "seconds": round(seconds, 3),
    }


def default_folder(job: Mapping[str, Any], requests: Sequence[ImageRequest]) -> Path:
    """`samples/PROMPT-HASH`: the same for the same job, so that repeating the command completes it, and else new."""
    content = json.dumps([job, [vars(request) for request in requests]], sort_keys=True)
    return Path("samples") / f"{slug(requests[0].prompt)}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _without_batch_size(config: SamplingConfig) -> dict[str, Any]:
    """The configuration as JSON data, without the one field that changes no picture."""
    return {name: value for name, value in config.to_mapping().items() if name != "batch_size"}


def _read_latents(file: Path, num_images: int, shape: tuple[int, int, int]) -> Tensor:
    """Initial noise float32 [N, C, h, w]."""
    try:
        refuse_foreign_content(file)
        latents = load_file(file).get("latents")
    except FileNotFoundError as error:
        raise InputNotFoundError(f"latents '{file}' not found", remedy="check --latents") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read latents '{file}'", str(error)) from error
    if latents is None:
        raise CheckpointError(f"cannot use latents '{file}'", "it has no tensor named 'latents'")
    expected = (num_images, *shape)
    if tuple(latents.shape) != expected:
        raise UsageError(
            f"latents '{file}' do not fit",
            f"their shape is {tuple(latents.shape)}, {expected} expected: one per image, prompt by prompt",
            "change --latents, -n, --size or the prompts",
        )
    if not bool(torch.isfinite(latents).all()):
        raise CheckpointError(f"cannot use latents '{file}'", "some values are not finite")
    return latents.float()
