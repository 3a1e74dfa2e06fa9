"""Samples that cannot be used: one exception with a reason, and the account of them that a run keeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm_cli.errors import DataError, StorageError

_MIN_BAD = 10


class BadSampleError(Exception):
    """A sample cannot be used.

    Attributes:
        reason: one of a fixed set of phrases, by which bad samples are counted, e.g. "damaged image".
        detail: what exactly was found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class BadSample:
    """Which sample could not be used, and why."""

    shard: str
    key: str
    reason: str
    detail: str


class BadSampleAccount:
    """Counts bad samples by reason and stops the run when there are too many.

    Args:
        max_fraction: of the samples read, above which the run stops once more than ten were bad.
        report: called with every bad sample.
    """

    def __init__(self, max_fraction: float, report: Callable[[BadSample], None] | None = None) -> None:
        self.reasons: Counter[str] = Counter()
        self.num_read = 0
        self._max_fraction, self._report = max_fraction, report

    def add(self, num_good: int, bad: list[BadSample]) -> None:
        """Account for what was read.

        Raises:
            DataError: too large a part was bad.
        """
        for sample in bad:
            self.reasons[sample.reason] += 1
            if self._report:
                self._report(sample)
        self.num_read += num_good + len(bad)
        total = self.reasons.total()
        if bad and total > _MIN_BAD and total > self._max_fraction * self.num_read:
            counts = ", ".join(f"{count} × {reason}" for reason, count in self.reasons.most_common())
            last = bad[-1]
            raise DataError(
                f"too many bad samples, the last one '{last.key}' in shard '{last.shard}'",
                f"{total} of {self.num_read} samples read ({counts})",
                "run `ldm data check` on the shards, or raise data.max_bad_fraction",
            )


class BadSampleLog:
    """A `bad_samples.jsonl`: one line `{shard, key, reason, detail}` per bad sample, however often it is met.

    Raises:
        StorageError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[tuple[str, str]] = set()
        try:
            if path.exists():
                for line in path.read_text(encoding="utf-8").splitlines():
                    self._remember(line)
        except OSError as error:
            raise StorageError(f"cannot read '{path}'", str(error.strerror)) from error

    def __call__(self, sample: BadSample) -> None:
        """Write the sample down if it is new."""
        if (sample.shard, sample.key) in self._known:
            return
        self._known.add((sample.shard, sample.key))
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(sample)) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write '{self._path}'", str(error.strerror)) from error

    def _remember(self, line: str) -> None:
        """Take up a line of an earlier life; one cut by a kill is passed over."""
        try:
            entry = json.loads(line)
            self._known.add((entry["shard"], entry["key"]))
        except (ValueError, KeyError, TypeError):
            return
