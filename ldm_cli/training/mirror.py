"""A process of its own that mirrors a run folder into a tracker: `python -m ldm_cli.training.mirror TRACKER FOLDER`.

It reads metrics.jsonl from its beginning, so that what an earlier process of the run wrote is neither doubled nor
missing, and ends when the standard input closes: with the trainer, however that ends. It does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["tensorboard", "wandb"]
LOG_FOLDER = "tensorboard"
"""Folder of TensorBoard's events, in that of the run."""
_SECONDS_BETWEEN_LOOKS = 0.5
_GRID = re.compile(r"step-(\d+)/grid\.png$")


class _Tracker(Protocol):
    """Where figures and grids go, each step once, in order."""

    def write(self, step: int, figures: Mapping[str, float], grid: Path | None) -> None:
        """The figures of a step, and its grid of samples if there is one."""

    def close(self) -> None:
        """All is written."""


class _TensorBoard:
    """Event files in `FOLDER/tensorboard`, which replace those of an earlier process of the run."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        shutil.rmtree(folder / LOG_FOLDER, ignore_errors=True)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder / LOG_FOLDER))

    def write(self, step: int, figures: Mapping[str, float], grid: Path | None) -> None:
        """See `_Tracker`."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        if grid is not None:
            values.append(self._summary.Value(tag="samples", image=_picture_of(grid, self._summary.Image)))
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """See `_Tracker`."""
        self._writer.flush()  # closing alone says nothing of what could not be written
        self._writer.close()


def _picture_of(grid: Path, image: Callable[..., Any]) -> Any:
    content = grid.read_bytes()
    # Width and height lie in the header of every PNG.
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    return image(encoded_image_string=content, width=width, height=height, colorspace=3)


class _WeightsAndBiases:
    """A run of wandb whose name and id are those of the folder; WANDB_PROJECT, WANDB_MODE and others hold as usual.

    Offline, it replaces the files of an earlier process of the run. Online, wandb drops the steps that it has already.
    """

    def __init__(self, folder: Path) -> None:
        import wandb

        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        recipe = json.loads((folder / "recipe.resolved.yaml").read_text(encoding="utf-8"))["recipe"]
        for earlier in (folder / "wandb").glob(f"offline-run-*-{identity}"):
            shutil.rmtree(earlier, ignore_errors=True)
        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ldm"),
            name=folder.resolve().name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=recipe,
        )

    def write(self, step: int, figures: Mapping[str, float], grid: Path | None) -> None:
        """See `_Tracker`."""
        pictures = {} if grid is None else {"samples": self._image(str(grid))}
        self._run.log({**figures, **pictures}, step=step)

    def close(self) -> None:
        """See `_Tracker`."""
        self._run.finish()


_TRACKERS: dict[TrackerName, Callable[[Path], _Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}


def follow(folder: Path, tracker: _Tracker, ended: Callable[[float], bool]) -> None:
    """Write each step of a run once, in order, until the trainer has ended.

    Args:
        tracker: where to.
        ended: waits up to some seconds; whether the trainer has ended.
    """
    lines, waiting, is_over = _new_lines(folder / "metrics.jsonl"), dict[int, dict[str, float]](), False
    written = -1
    while not is_over:
        is_over = ended(_SECONDS_BETWEEN_LOOKS)
        waiting |= {step: figures for step, figures in next(lines) if step > written}
        newest = max(waiting, default=written)
        grids = {int(m[1]): path for path in folder.glob("samples/step-*/grid.png") if (m := _GRID.search(str(path)))}
        # The grid of a step is made after its line: a step waits for the next line, or for the end.
        for step in sorted(set(waiting) | {step for step in grids if step > written}):
            if is_over or step < newest:
                tracker.write(step, waiting.pop(step, {}), grids.get(step))
                written = step
    tracker.close()


def _new_lines(file: Path) -> Iterator[list[tuple[int, dict[str, float]]]]:
    """The whole lines that were added since the last call, as steps and their figures."""
    place, rest = 0, b""
    while True:
        if file.exists():
            with file.open("rb") as stream:
                stream.seek(place)
                rest += stream.read()
                place = stream.tell()
        *whole, rest = rest.split(b"\n")
        found = []
        for line in whole:
            figures = json.loads(line)
            step = figures.pop("step")
            found.append((step, {name: value for name, value in figures.items() if value is not None}))
        yield found


def _main(tracker: TrackerName, folder: Path) -> None:
    closed = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        closed.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    follow(folder, _TRACKERS[tracker](folder), closed.wait)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))  # type: ignore[arg-type]
