"""The report of `ldm data pack`: pictures that were left out, files that were not read, conversions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ldm_cli.data.bad_samples import BadSampleError

_MAX_NAMED = 100


@dataclass
class PackReport:
    """Counts by kind, and the names behind them.

    Attributes:
        bad: pictures that were left out, by reason.
        bad_files: `name: reason` of each.
        not_read: files that are no picture, caption or table of the source, by kind.
        tables_not_read: of these the tables, each with the reason and the remedy.
        remarks: conversions, such as "Windows-1252 text".
        classes: names of the classes in the order of their numbers, if the source has some.
        repeats: how often each kohya folder is repeated.
        from_class_names: captions that were made of a class name.
    """

    bad: Counter[str] = field(default_factory=Counter)
    bad_files: list[str] = field(default_factory=list)
    not_read: Counter[str] = field(default_factory=Counter)
    tables_not_read: list[str] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)
    classes: tuple[str, ...] = ()
    repeats: dict[str, int] = field(default_factory=dict)
    from_class_names: int = 0
    _not_read_files: list[str] = field(default_factory=list)

    def leave_out(self, name: str, error: BadSampleError) -> None:
        """Count a picture that cannot be packed."""
        self.bad[error.reason] += 1
        self.bad_files.append(f"{name}: {error}")

    def pass_over(self, kind: str, name: str) -> None:
        """Count a file that is not read; the first hundred of each kind are named."""
        self.not_read[kind] += 1
        if self.not_read[kind] <= _MAX_NAMED:
            self._not_read_files.append(name)

    def remark(self, what: str) -> None:
        """Count a conversion."""
        self.remarks[what] += 1

    def what_was_seen(self) -> str:
        """One line for a source without a single usable picture."""
        counts = [f"{count} × {kind}" for kind, count in (self.bad + self.not_read).most_common(8)]
        names = [*self.bad_files[:3], *self._not_read_files[:3]]
        return f"it holds {', '.join(counts)}, such as {', '.join(names)}" if counts else "it holds none"

    def summary(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {
            "captions_from_class_names": self.from_class_names,
            "classes": {name: number for number, name in enumerate(self.classes)},
            "repeats": self.repeats,
            "remarks": dict(self.remarks.most_common()),
            "bad": dict(self.bad.most_common()),
            "bad_files": self.bad_files,
            "not_read": dict(self.not_read.most_common()),
            "not_read_files": self._not_read_files,
        }
