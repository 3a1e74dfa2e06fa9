"""`train.track`: processes that mirror a run into trackers. None of them can stop or delay the run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from ldm_cli.errors import UsageError
from ldm_cli.training.mirror import TrackerName

_SECONDS_TO_END = 20.0


def expect_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        UsageError: naming the first one.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"train.track: {name} is not installed", remedy=f"pip install {name}")


class Trackers:
    """A process for each tracker, while the context is open. What they print is in `FOLDER/track-NAME.log`.

    Args:
        warn: is called once for a tracker that failed, or does not end in time; the next process of the run mirrors
            what is missing.
    """

    def __init__(self, names: Sequence[TrackerName], folder: Path, warn: Callable[[str], None]) -> None:
        self._names, self._folder, self._warn = names, folder, warn
        self._processes: dict[TrackerName, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        for name in self._names:
            command = [sys.executable, "-m", "ldm_cli.training.mirror", name, str(self._folder)]
            try:
                with ExitStack() as stack:
                    output = stack.enter_context((self._folder / f"track-{name}.log").open("wb"))
                    # In a session of its own: Ctrl-C and a batch queue's signal are for the trainer.
                    self._processes[name] = subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
                    )
            except OSError as error:
                self._warn(f"train.track: {name} cannot start: {error.strerror or error}")
        return self

    def check(self) -> None:
        """Warn of a tracker that has ended; does not wait."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                self._give_up(name, "failed")

    def _give_up(self, name: TrackerName, why: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        self._warn(f"train.track: {name} {why}; see {self._folder / f'track-{name}.log'}; the run goes on without it")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.check()
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for name, process in list(self._processes.items()):
            try:
                if process.wait(_SECONDS_TO_END) != 0:
                    self._give_up(name, "failed")
            except subprocess.TimeoutExpired:
                self._give_up(name, f"did not end within {_SECONDS_TO_END:g} s")
