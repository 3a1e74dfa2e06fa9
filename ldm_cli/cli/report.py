"""Progress and messages of a stage: bars on a terminal, otherwise a plain line every few seconds."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ldm_cli.cli.streams import write_line
from ldm_cli.errors import printable
from ldm_cli.reporting import Figure, Progress, Reporter

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_WORTH_A_LINE = 2.0
_RATE_WINDOW = 30.0
_RATE_UPDATES = 12
_ROOMY_COLUMNS = 100


_running: list[Pace] = []
"""The operations under way, outermost first; those that an exception ended stay."""


def work_done() -> str | None:
    """How far the command was when an exception ended it, as `Pace.done_of_total`; None if it counted nothing yet."""
    return _running[0].done_of_total() if _running else None


def make_reporter() -> Reporter:
    """The reporter for the stderr at hand."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveReporter()
    return PlainReporter()


class Pace:
    """Rate and remaining time of a counted operation.

    Both count the last half minute or the last dozen updates, whichever is longer, so that one pause for a validation
    or a checkpoint does not distort them.
    """

    def __init__(self, total: int | None, done: int, unit: str, clock: Callable[[], float]) -> None:
        self.total, self.done, self.unit, self._clock = total, done, unit, clock
        self._history = deque([(clock(), done)])

    def update(self, done: int) -> None:
        """`done` units are complete now."""
        self.done = done
        now = self._clock()
        self._history.append((now, done))
        while len(self._history) > _RATE_UPDATES and now - self._history[0][0] > _RATE_WINDOW:
            self._history.popleft()

    @property
    def rate(self) -> float | None:
        """Units per second; None before it is known."""
        (start, first), (end, last) = self._history[0], self._history[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    def __str__(self) -> str:
        """`3.4 step/s, ETA 0:09:12`, or as much of it as is known."""
        rate = self.rate
        if rate is None:
            return ""
        if rate < 1:
            speed = f"{1 / rate:.3g} s/{self.unit}"
        else:
            speed = f"{rate:.3g} {self.unit}/s" if rate < 1000 else f"{rate:.0f} {self.unit}/s"
        if self.total is None or self.done >= self.total:
            return speed
        return f"{speed}, ETA {_clock_time((self.total - self.done) / rate)}"

    def done_of_total(self) -> str:
        """`120 of 2000 steps`."""
        return f"{self.done}{f' of {self.total}' if self.total else ''} {self.unit}s"

    def count(self) -> str:
        """`step 120/2000 (6%)`."""
        if not self.total:
            return f"{self.unit} {self.done}"
        return f"{self.unit} {self.done}/{self.total} ({100 * self.done // self.total}%)"


def show_figures(figures: Mapping[str, Figure]) -> str:
    """`loss 0.1234, lr 0.0001`."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )


def _joined(pace: Pace, figures: Mapping[str, Figure], width: int | None = None) -> str:
    """`step 120/2000 (6%), 3.4 step/s, ETA 0:09:12, loss 0.1234`; what is beyond `width` columns is left out whole."""
    parts = [pace.count(), *str(pace).split(", "), *(show_figures({name: value}) for name, value in figures.items())]
    text = ""
    for part in filter(None, parts):
        longer = f"{text}, {part}" if text else part
        if text and width is not None and len(longer) > width:
            break
        text = longer
    return text


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class PlainReporter:
    """Lines without control characters, for files, pipes and batch queues."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def info(self, message: str) -> None:
        """One line of information."""
        write_line(message)

    def warn(self, message: str) -> None:
        """One line that begins with `warning:`."""
        write_line(f"warning: {message}")

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0, unit: str = "step") -> Iterator[Progress]:
        """A line every few seconds, and one at the end."""
        pace = Pace(total, done, unit, self._clock)
        lines = _PlainProgress(title, pace, self._clock)
        _running.append(pace)
        yield lines
        _running.remove(pace)
        lines.finish()


class _PlainProgress:
    def __init__(self, title: str, pace: Pace, clock: Callable[[], float]) -> None:
        self._title, self._pace, self._clock = title, pace, clock
        self._figures: Mapping[str, Figure] = {}
        self._started_at = self._shown_at = clock()
        self._shown_done = pace.done

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """Keep the new state, and write it if the last line is some seconds old."""
        self._pace.update(done)
        self._figures = figures or self._figures
        if self._clock() - self._shown_at >= _SECONDS_BETWEEN_LINES:
            self._show()

    def finish(self) -> None:
        """Write the last state, unless it was written already or everything took only a moment."""
        took = self._clock() - self._started_at
        if self._pace.done != self._shown_done and took >= _SECONDS_WORTH_A_LINE:
            self._show()

    def _show(self) -> None:
        write_line(f"{self._title}: {_joined(self._pace, self._figures)}")
        self._shown_at, self._shown_done = self._clock(), self._pace.done


class LiveReporter:
    """Bars at the bottom of a terminal, messages above them."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._bar_width = 24 if self._console.width >= _ROOMY_COLUMNS else 12
        self._bars: RichProgress | None = None

    def info(self, message: str) -> None:
        """One line of information, above the bars."""
        self._print(message)

    def warn(self, message: str) -> None:
        """One yellow line, above the bars."""
        self._print(f"warning: {message}", style="yellow")

    def _print(self, message: str, style: str | None = None) -> None:
        try:
            self._console.print(printable(message), style=style, markup=False, emoji=False, soft_wrap=True)
        except (OSError, SystemExit):  # the terminal was closed; the run continues
            self._console.quiet = True

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0, unit: str = "step") -> Iterator[Progress]:
        """A bar; nested ones stand below it."""
        bars, outermost = self._bars, self._bars is None
        if bars is None:
            bars = self._bars = self._new_bars()
            bars.start()
        pace = Pace(total, done, unit, time.monotonic)
        task = bars.add_task(printable(title), total=total, completed=done, about=pace.count())
        _running.append(pace)
        try:
            yield _LiveProgress(bars, task, pace, self._console.width - len(printable(title)) - self._bar_width - 2)
            _running.remove(pace)
        finally:
            if outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)

    def _new_bars(self) -> RichProgress:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        return RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=self._bar_width),
            TextColumn("{task.fields[about]}", markup=False),
            console=self._console,
            refresh_per_second=4,
        )


class _LiveProgress:
    def __init__(self, bars: RichProgress, task: TaskID, pace: Pace, width: int) -> None:
        self._bars, self._task, self._pace, self._width = bars, task, pace, width
        self._figures: Mapping[str, Figure] = {}

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """Move the bar."""
        self._pace.update(done)
        self._figures = figures or self._figures
        about = _joined(self._pace, self._figures, self._width)
        self._bars.update(self._task, completed=done, about=printable(about))
