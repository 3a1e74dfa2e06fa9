"""The samples of steps that were skipped because their loss or gradient was not finite."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import RunFolder


class SkippedSteps:
    """Remembers the samples of each step until it is known, without waiting for the device, whether it was taken.

    Attributes:
        steps: (step, names of this rank's samples) for each.
        kept: on the device, for each: 1 if the step was taken, or 0; the same on all ranks.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[int, list[str]]] = []
        self.kept: list[Tensor] = []

    def add(self, step: int, names: list[str], kept: Tensor) -> None:
        """Remember a step."""
        self.steps.append((step, names))
        self.kept.append(kept)

    def report(self, kept: Sequence[float], run: RunFolder, ranks: Ranks, is_expected: bool) -> None:
        """Write to log.txt the samples, of all ranks, of the steps that were skipped; all ranks call.

        Args:
            kept: the values of `kept`.
            run: where they are written.
            is_expected: a skipped step is no reason for a warning (fp16 finds its loss scale by overflows).
        """
        for (step, names), was_taken in zip(self.steps, kept, strict=True):
            if not was_taken:
                every = [name for part in ranks.texts(json.dumps(names)) for name in json.loads(part)]
                message = f"step {step} was skipped: loss or gradient is not finite"
                (run.note if is_expected else run.warn)(message)
                run.note(f"samples of step {step}: {', '.join(every)}")
