"""`ldm eval`: metrics of trained models on shards.

One pass over the samples measures everything real. Then pictures of as many captions are generated and measured, for
every pipeline and every point of the sweep.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from itertools import product
from typing import Any

import torch

from ldm_cli.core.models.lpips import SMALLEST_SIDE
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.shards import ShardSet
from ldm_cli.errors import DivergedError, RecipeError, UsageError
from ldm_cli.evaluation.config import MetricName
from ldm_cli.evaluation.image_quality import SSIM_WINDOW
from ldm_cli.evaluation.scene_detector import WORKING_SIZE
from ldm_cli.recipe.eval_section import SweepPoint
from ldm_cli.recipe.schema import EvalRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.stages.support.eval_metrics import check_truths, metrics_of_generated, metrics_of_real
from ldm_cli.stages.support.eval_models import Models, Pipelines
from ldm_cli.stages.support.eval_result import EvalResult
from ldm_cli.stages.support.eval_samples import RealSamples, measure_generated, measure_probe, measure_real
from ldm_cli.stages.support.kept_pictures import kept_pictures
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions, resolve_device, settled
from ldm_cli.training.distributed import SECONDS_OF_SILENCE, joined, local_rank
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import environment
from ldm_cli.training.run_identity import flatten


def run(recipe: EvalRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Measure the models of `recipe`.

    Returns:
        `metrics`: by name, each with the number of samples it was measured on; with `eval.sweep` or `eval.pipelines`
        those of pictures are in `points` instead, a list of `pipeline`, `settings`, `metrics`. `provenance`: date,
        versions, hashes of the models' weights, fingerprint of the data, and every setting. Empty on all ranks but the
        first. With `options.out`, written to `eval.json` in that folder, or to the file itself where the name ends in
        `.json`; an interrupted evaluation goes on, and the result of a finished one is read.

    Raises:
        OutputError: another result exists already and is not to be overwritten.
        InputNotFoundError, CheckpointError: a model cannot be loaded.
        DataError: the samples lack what a metric needs.
        DivergedError: a model gives values that are not finite.
    """
    recipe = with_model_folders(recipe, reporter)
    device = resolve_device(options.device, local_rank())
    with joined(device, SECONDS_OF_SILENCE) as ranks:
        return _Evaluation(recipe, device, reporter, ranks).result(options)


class _Evaluation:
    """The models, the data, and what is measured of them."""

    def __init__(self, recipe: EvalRecipe, device: torch.device, reporter: Reporter, ranks: Ranks) -> None:
        config = recipe.eval
        self.recipe, self.config, self.reporter, self.ranks = recipe, config, reporter, ranks
        self.points = config.sweep_points()
        num_pictures = config.num_generated * len(self.points)
        self.settled = settled(config.sampling, num_pictures, device, reporter.info)
        with ranks.first_then_others():
            self.shards = open_shards(recipe.data.shards, recipe.data, reporter)
            probed = config.probe_shards if "linear_probe" in config.metrics else None
            self.probe_shards = None if probed is None else open_shards(probed, recipe.data, reporter)
        self.models = Models.load(config, device)
        self.pipelines = Pipelines(config, self.settled, device)
        self.provenance = self._checked_provenance()

    def result(self, options: RunOptions) -> dict[str, Any]:
        """That of `run`."""
        if options.out is None:
            if self.config.keep_pictures:
                raise UsageError("eval.keep_pictures has no place for the pictures", remedy="give --out")
            return self._measured(None)
        place = EvalResult(options.out, self.provenance, self.reporter)
        found = place.claim(options.overwrite) if self.ranks.is_first else None
        if self.ranks.from_first("found" if found else ""):
            return found or {}
        try:
            result = self._measured(place)
            if self.ranks.is_first:
                place.write(result)
                if "points" in result:
                    # It imports matplotlib, which takes long.
                    from ldm_cli.stages.support.eval_curve import save_curve

                    for file in save_curve(result["points"], place.curve):
                        self.reporter.info(f"the curve is in {file}")
            return result
        finally:
            place.release()

    def _checked_provenance(self) -> dict[str, Any]:
        """Where the numbers come from; sizes that a metric cannot use are refused, before anything is measured."""
        _check_scenes("data.image_size", (self.recipe.data.image_size,) * 2, self.config.metrics)
        _check_reconstruction(self.recipe.data.image_size, self.models)
        of_pipelines = {}
        for name in self.pipelines.names:
            for point in self.points:
                size = self.pipelines.load(name).image_size(self._sampling(point))
                _check_scenes("eval.sampling", size, self.config.metrics)
            of_pipelines[name] = self.pipelines.provenance(name)
        if self.config.pipelines and of_pipelines:
            of_pipelines = {"pipelines": of_pipelines}
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(self.models.device),
            "device": str(self.models.device),
            "models": self.models.provenance | of_pipelines,
            "data": _described(self.shards),
            **({} if self.probe_shards is None else {"probe_shards": _described(self.probe_shards)}),
            "recipe": self.recipe.to_mapping(),
        }

    def _sampling(self, point: SweepPoint) -> SamplingConfig:
        same = {"precision": self.settled.precision, "compile": self.settled.compile}
        return point.sampling.model_copy(update=same)

    def _measured(self, place: EvalResult | None) -> dict[str, Any]:
        """The result; empty on all ranks but the first."""
        config, models, warn = self.config, self.models, self.reporter.warn
        own = None if place is None else place.measured / "real"
        real = measure_real(self.recipe, self.shards, models, self.reporter, self.ranks, own)
        probe = None
        if self.probe_shards is not None:
            own = None if place is None else place.measured / "probe"
            probe = measure_probe(self.recipe, self.probe_shards, models, self.reporter, self.ranks, own)
        if "attribute_accuracy" in config.metrics:
            check_truths(real, config.num_generated)
        metrics = _finite(metrics_of_real(config, models, real, probe, warn)) if self.ranks.is_first else {}
        captions = real.captions[: config.num_generated]
        points = list(self._points(real, captions, place))
        if not self.ranks.is_first:
            return {}
        if real.measured.num_truncated:
            warn(f"{real.measured.num_truncated} texts were too long for the CLIP and were cut")
        counts = {
            "num_samples": min(config.num_samples, len(real.keys)),
            "num_generated": len(captions) if points else 0,
        }
        provenance = {**self.provenance, "data": {**self.provenance["data"], **counts}}
        if config.pipelines or config.sweep:
            return {"metrics": metrics, "points": points, "provenance": provenance}
        for name, values in points[0]["metrics"].items() if points else ():
            metrics[name] = {**metrics.get(name, {}), **values}
        return {"metrics": {name: metrics[name] for name in config.metrics}, "provenance": provenance}

    def _points(self, real: RealSamples, captions: list[str], place: EvalResult | None) -> Iterator[dict[str, Any]]:
        """What is measured of every pipeline at every point of the sweep."""
        config, reporter, ranks = self.config, self.reporter, self.ranks
        for number, (name, point) in enumerate(product(self.pipelines.names, self.points)):
            pipeline = self.pipelines.load(name)
            if config.pipelines or config.sweep:
                reporter.info(f"measuring {name}" + "".join(f", {n} {value}" for n, value in point.settings.items()))
            sampling, measured, keep = self._sampling(point), None, None
            if place is not None:
                part = f"{number:03d}-{name}"
                measured = place.measured / part
                if config.keep_pictures:
                    keep = kept_pictures(place.pictures / part, pipeline, sampling, captions, ranks, reporter.warn)
            generated = measure_generated(
                config, sampling, captions, pipeline, self.models, reporter, ranks, measured, keep
            )
            if ranks.is_first:
                metrics = _finite(metrics_of_generated(config, self.models, real, generated, reporter.warn))
                yield {"pipeline": name, "settings": dict(point.settings), "metrics": metrics}


def _described(shards: ShardSet) -> dict[str, Any]:
    return {"shards": [path.name for path in shards.paths], "fingerprint": shards.fingerprint}


def _check_scenes(field: str, size: tuple[int, int], metrics: Collection[MetricName]) -> None:
    """Refuse a height and width, given by a field of the recipe, at which scenes cannot be read.

    Raises:
        RecipeError: naming both.
    """
    height, width = size
    if "attribute_accuracy" in metrics and (height != width or height < WORKING_SIZE):
        raise RecipeError(
            f"attribute_accuracy cannot be measured at {field}: {width}x{height}",
            f"squares of at least {WORKING_SIZE} pixels are needed",
        )


def _check_reconstruction(size: int, models: Models) -> None:
    """Refuse images that the autoencoder cannot take, or that are too small for SSIM or LPIPS.

    Raises:
        RecipeError: naming the size.
    """
    smallest = SSIM_WINDOW if models.lpips is None else SMALLEST_SIDE[models.lpips.backbone]
    if models.vae is not None and (size % models.vae.factor or size < smallest):
        raise RecipeError(
            f"reconstructions cannot be measured at data.image_size={size}",
            f"a multiple of {models.vae.factor}, at least {smallest}, is needed",
        )


def _finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics.

    Raises:
        DivergedError: a number is not finite.
    """
    numbers = flatten(metrics)
    if bad := [name for name, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise DivergedError(f"{', '.join(bad)} cannot be measured", "the values are not finite")
    return metrics
