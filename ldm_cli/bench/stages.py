"""Our contenders that train or encode: the command itself, in a run folder of its own, taking turns as it reports."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_cli.bench.race import Turns
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.reporting import Figure, SilentReporter
from ldm_cli.stages import precompute, trainer_stage
from ldm_cli.stages.support.options import RunOptions

STEPS = 4
"""Training steps of a turn."""
_NEVER = 10**9
ENCODED_IMAGES = 64
"""Images of a turn of `ldm precompute`."""


def train(turns: Turns, recipe: TrainRecipe, device: str) -> None:
    """The recipe's trainer: loader, copies, noise, step, average and log, without validation, pictures and saves."""
    periods = {"log_every": STEPS, "save_every": _NEVER, "validate_every": 0, "sample_every": 0, "steps": _NEVER}
    changes = {
        "train": recipe.train.model_copy(update=periods),
        "data": recipe.data.model_copy(update={"val_shards": None}),
    }
    reporter = _TurnTaking(turns, recipe.name, STEPS, recipe.train.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        options = RunOptions(out=Path(scratch) / "run", device=device)
        trainer_stage(recipe.command).run(recipe.model_copy(update=changes), options, reporter)


def encode(turns: Turns, recipe: TrainUnetRecipe, device: str) -> None:
    """`ldm precompute` of the recipe, while it encodes images."""
    with tempfile.TemporaryDirectory() as scratch:
        options = RunOptions(out=Path(scratch) / "cache", device=device)
        precompute.run(recipe, options, _TurnTaking(turns, "encoding images", ENCODED_IMAGES, 1))


class _TurnTaking(SilentReporter):
    """Ends a turn at every so many reports of the progress with this title."""

    def __init__(self, turns: Turns, title: str, every: int, units: int) -> None:
        super().__init__()
        self._turns, self._title, self._every, self._units = turns, title, every, units
        self._last = 0

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0, unit: str = "step") -> Iterator[Any]:
        """Receive the progress of the command, and ignore all others."""
        with super().progress(title, total, done, unit) as silence:
            yield self if title == self._title else silence

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """`done` steps or images are complete."""
        if done != self._last and done % self._every == 0:  # a logged step is reported twice
            self._last = done
            self._turns.done(self._every * self._units)
