"""The samples of steps that were skipped because their loss or gradient was not finite."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import RunFolder


class SkippedSteps:
    """Remembers the samples of each step until it is known, without waiting for the device, whether it was taken."""

    def __init__(self) -> None:
        self._unknown: list[tuple[int, list[str], Tensor]] = []

    def add(self, step: int, names: list[str], kept: Tensor) -> None:
        """`names` are this rank's samples; `kept` is 1 if the step was taken, or 0, the same on all ranks."""
        self._unknown.append((step, names, kept))

    def report(self, run: RunFolder, ranks: Ranks, is_expected: bool) -> None:
        """Write to log.txt the samples, of all ranks, of the steps skipped since the last call; all ranks call. Waits
        for the device.

        Args:
            is_expected: a skipped step is no reason for a warning (fp16 finds its loss scale by overflows).
        """
        if not self._unknown:
            return
        kept = torch.stack([kept for _, _, kept in self._unknown]).tolist()
        for (step, names, _), was_taken in zip(self._unknown, kept, strict=True):
            if not was_taken:
                every = [name for part in ranks.texts(json.dumps(names)) for name in json.loads(part)]
                message = f"step {step} was skipped: loss or gradient is not finite"
                (run.note if is_expected else run.warn)(message)
                run.note(f"samples of step {step}: {', '.join(every)}")
        self._unknown.clear()
