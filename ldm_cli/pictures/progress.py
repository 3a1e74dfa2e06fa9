"""One progress count for a job that is generated in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ldm_cli.reporting import Figure, Progress, Reporter


class PartOfProgress:
    """A reporter for a part of a job; it adds the part's count to the finished units of the job."""

    def __init__(self, reporter: Reporter, whole: Progress, before: int) -> None:
        """For the part that begins after `before` units of `whole`; messages go to `reporter`."""
        self._whole, self._before = whole, before
        self.info, self.warn = reporter.info, reporter.warn

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0, unit: str = "step") -> Iterator[Progress]:
        """The part's own count; its title and total are not shown."""
        yield self

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """`done` units of the part are complete."""
        self._whole.update(self._before + done, figures)
