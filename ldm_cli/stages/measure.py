"""`--dry-run --measure`: the time of a training step on this machine, taken from the first steps of the run itself."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.reporting import Figure, Progress, Reporter
from ldm_cli.stages import trainer_stage
from ldm_cli.stages.support.options import RunOptions

_NUM_STEPS = 6
"""Steps that are taken; the first half warms up."""


class _MeasuredError(Exception):
    """Enough steps were taken."""


class _Watch:
    """A reporter that ends the training after some steps, and keeps their rates."""

    def __init__(self, reporter: Reporter) -> None:
        self.rates: list[float] = []
        self.warn = reporter.warn

    def info(self, message: str) -> None:
        """Say nothing: the folder of this run is of no use to anybody."""

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0, unit: str = "step") -> Iterator[Progress]:
        """This reporter itself."""
        yield self

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """Note the rate of a step."""
        if figures and isinstance(rate := figures.get("images_per_second"), float):
            self.rates.append(rate)
            if len(self.rates) == _NUM_STEPS:
                raise _MeasuredError


def measure(recipe: TrainRecipe, options: RunOptions, num_samples: int | None, reporter: Reporter) -> dict[str, float]:
    """Train a few steps in a folder that is deleted.

    Args:
        recipe: whose models and data exist.
        options: of them the device.
        num_samples: of the training data; None: unknown.

    Returns:
        `images_per_second`, `seconds_per_step`, `hours`, and `hours_per_epoch` if the data are counted.
    """
    steps = max(recipe.train.steps, _NUM_STEPS + 1)
    quick: dict[str, Any] = {"steps": steps, "log_every": 1, "validate_every": 0, "sample_every": 0, "track": ()}
    train = recipe.train.model_copy(update=quick | {"save_every": steps})
    data = recipe.data.model_copy(update={"val_shards": None})
    watch = _Watch(reporter)
    with tempfile.TemporaryDirectory(prefix="ldm-measure-") as folder:
        changed = recipe.model_copy(update={"train": train, "data": data})
        with suppress(_MeasuredError):
            trainer_stage(recipe.command).run(changed, replace(options, out=Path(folder) / "run"), watch)
    rate = statistics.median(watch.rates[_NUM_STEPS // 2 :])
    seconds = recipe.train.batch_size / rate
    found = {"images_per_second": rate, "seconds_per_step": seconds, "hours": seconds * recipe.train.steps / 3600}
    return found | ({"hours_per_epoch": num_samples / rate / 3600} if num_samples else {})
