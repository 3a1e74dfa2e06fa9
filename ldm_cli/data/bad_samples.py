"""Samples that cannot be used: an exception with a reason, and the count and log that a run keeps."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from ldm_cli.errors import DataError, StorageError
from ldm_cli.inputs import read_input
from ldm_cli.storage import open_output

_MIN_BAD = 10
_MOST_BYTES = 2**30


class BadSampleError(Exception):
    """A sample cannot be used.

    Attributes:
        reason: one of a fixed set of phrases, by which bad samples are counted, e.g. "damaged image".
        detail: the exact finding.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class BadSample:
    """An unusable sample and the reason; in training also the step and the place in its batch."""

    shard: str
    key: str
    reason: str
    detail: str
    step: int | None = None
    place: int | None = None


_ENTRY = TypeAdapter(BadSample)


class BadSampleAccount:
    """Counts bad samples by reason and stops the run when there are too many.

    Args:
        max_fraction: share of the samples read above which the run stops, once more than ten were bad.
        report: called with every bad sample.
    """

    def __init__(self, max_fraction: float, report: Callable[[BadSample], None] | None = None) -> None:
        self.reasons: Counter[str] = Counter()
        self.num_read = 0
        self._max_fraction, self._report = max_fraction, report

    def restore(self, num_good: int, reasons: Counter[str]) -> None:
        """Continue the counts of an interrupted run."""
        self.reasons = Counter(reasons)
        self.num_read = num_good + reasons.total()

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
                f"{total} of {self.num_read} samples read ({counts})" + (f": {last.detail}" if last.detail else ""),
                "run `ldm data check` on the shards, or raise data.max_bad_fraction",
            )


class BadSampleLog:
    """A `bad_samples.jsonl`: one line for each time that a bad sample was read. Interruptions do not change it.

    Several ranks may write to one file, each in its own `BadSampleLog`.

    Raises:
        StorageError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[BadSample, None] = dict.fromkeys(read_bad_samples(path) if path.exists() else ())
        self._is_cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")

    def __call__(self, sample: BadSample) -> None:
        """Write the sample down, unless the file has it already."""
        if sample in self._known:
            return
        self._known[sample] = None
        try:
            with os.fdopen(open_output(self._path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0) as file:
                file.write((("\n" if self._is_cut else "") + json.dumps(asdict(sample)) + "\n").encode())
                self._is_cut = False
        except OSError as error:
            raise StorageError(f"cannot write '{self._path}'", str(error.strerror)) from error

    def reasons_before(self, step: int, places: slice) -> Counter[str]:
        """Bad samples by reason before a step, in these places of the batches."""
        return Counter(
            sample.reason
            for sample in self._known
            if sample.step is not None
            and sample.place is not None
            and sample.step < step
            and places.start <= sample.place < places.stop
        )


def read_bad_samples(path: Path) -> list[BadSample]:
    """The entries of a `bad_samples.jsonl`; incomplete lines, as a kill may leave them, are skipped.

    Raises:
        InputNotFoundError, StorageError, DataError: as in `read_input`.
    """
    found = []
    for line in read_input(path, _MOST_BYTES).splitlines():
        with suppress(ValueError):
            found.append(_ENTRY.validate_json(line, strict=True))
    return found
