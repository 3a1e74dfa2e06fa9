"""Overviews of a job: `grid.png`, kept up to date during the run, `preview.png`, and walks as animations."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from ldm_cli.pictures.grid import image_grid, labelled_grid, placeholder, stacked
from ldm_cli.pictures.images import read_image, save_animation, save_image
from ldm_cli.pictures.job import Job, Sheet
from ldm_cli.pictures.job_folder import GRID, PREVIEW, JobFolder

_MOST_IN_GRID = 400
_SECONDS_BETWEEN_GRIDS = 2.0
_PAUSE_FACTOR = 20
"""The pause after a grid, in multiples of the time that it took."""
_MILLISECONDS_PER_FRAME = 100


class Sheets:
    """Writes the files that show several pictures of a job. Missing pictures are grey."""

    def __init__(self, folder: JobFolder, job: Job) -> None:
        self._folder, self._job = folder, job
        self._next = time.monotonic() + _SECONDS_BETWEEN_GRIDS

    def refresh(self) -> None:
        """Write the grid as it is now, unless the last one is recent: grids take at most a twentieth of the time."""
        started = time.monotonic()
        if started >= self._next:
            self.write_grid()
            ended = time.monotonic()
            self._next = ended + max(_SECONDS_BETWEEN_GRIDS, _PAUSE_FACTOR * (ended - started))

    def write_grid(self) -> Path:
        """grid.png of the job's first pictures, sheet by sheet; returns its path.

        Raises:
            OutputError, StorageError: writing failed.
        """
        shown: list[Tensor] = []
        count = 0
        for sheet in self._job.sheets:
            shown.append(self._composed(sheet, _MOST_IN_GRID - count, is_first=not shown))
            count += len(sheet.items)
            if count >= _MOST_IN_GRID:
                break
        path = self._folder.path / GRID
        save_image(path, shown[0] if len(shown) == 1 else stacked(shown))
        return path

    def write_animations(self) -> list[Path]:
        """A WebP file for every walk without missing frames: `walk-SEED.webp`; returns their paths.

        Raises:
            OutputError, StorageError: writing failed.
        """
        paths = []
        for sheet in self._job.sheets:
            if sheet.is_walk and all(self._folder.file(i).is_file() for i in sheet.items):
                seed = self._job.items[sheet.items[0]].request.seed
                path = self._folder.animation(seed)
                save_animation(path, [read_image(self._folder.file(i)) for i in sheet.items], _MILLISECONDS_PER_FRAME)
                paths.append(path)
        return paths

    def write_preview(self, images: Tensor) -> None:
        """preview.png of the unfinished pictures, uint8 [N, 3, H, W].

        Raises:
            OutputError, StorageError: writing failed.
        """
        save_image(self._folder.path / PREVIEW, image_grid(list(images)))

    def remove_preview(self) -> None:
        """Delete preview.png, as its pictures are finished."""
        (self._folder.path / PREVIEW).unlink(missing_ok=True)

    def _composed(self, sheet: Sheet, limit: int, is_first: bool) -> Tensor:
        columns = sheet.columns or 1
        items = sheet.items[: max(1, limit // columns) * columns]
        present = {i: read_image(self._folder.file(i)) for i in items if self._folder.file(i).is_file()}
        size = next(((p.shape[1], p.shape[2]) for p in present.values()), (16, 16))
        pictures = [present[i] if i in present else placeholder(size) for i in items]
        if not sheet.column_labels:
            return image_grid(pictures, sheet.columns)
        # All sheets of a job have the same axes: the first one names them.
        labels = sheet.column_labels if is_first else ("",) * columns
        return labelled_grid(pictures, labels, sheet.row_labels, sheet.axis_names, sheet.title)
