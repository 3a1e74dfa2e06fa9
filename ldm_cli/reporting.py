"""Messages and progress without printing: functions take a `Reporter`, and only the one of `cli/` writes to a
terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Figure = float | int | str


class Progress(Protocol):
    """A running operation, counted in its own unit."""

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """`done` units are complete; `figures` (loss, rate, …) are shown beside the bar."""


class Reporter(Protocol):
    """Receives the messages and the progress of a stage."""

    def info(self, message: str) -> None:
        """One line of information."""

    def warn(self, message: str) -> None:
        """One line that the user should look at."""

    def progress(
        self, title: str, total: int | None, done: int = 0, unit: str = "step"
    ) -> AbstractContextManager[Progress]:
        """An operation of `total` units (None: unknown), `done` of them already complete."""


class _Silence:
    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """Say nothing."""


class SilentReporter:
    """Says nothing; keeps messages in `messages` so that tests can read them."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def info(self, message: str) -> None:
        """Keep the line."""
        self.messages.append(message)

    def warn(self, message: str) -> None:
        """Keep the line, marked as a warning."""
        self.messages.append(f"warning: {message}")

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0, unit: str = "step") -> Iterator[Progress]:
        """A progress that shows nothing."""
        yield _Silence()
