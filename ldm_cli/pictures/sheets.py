"""The pictures of a job side by side: `grid.png`, kept up to date while they are drawn, and walks as animations."""

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
_REST = 20  # times as long as the last grid took
_MILLISECONDS_PER_FRAME = 100
_WIDEST_PREVIEW = 8


class Sheets:
    """Draws what shows several pictures; those that are missing are grey."""

    def __init__(self, folder: JobFolder, job: Job) -> None:
        self._folder, self._job = folder, job
        self._next = time.monotonic() + _SECONDS_BETWEEN_GRIDS

    def refresh(self) -> None:
        """Draw the grid as it is now, unless that was done a moment ago; costs next to nothing in the long run."""
        started = time.monotonic()
        if started >= self._next:
            self.write_grid()
            ended = time.monotonic()
            self._next = ended + max(_SECONDS_BETWEEN_GRIDS, _REST * (ended - started))

    def write_grid(self) -> Path:
        """grid.png of the job's first pictures, sheet by sheet; returns its path.

        Raises:
            OutputError, StorageError: writing failed.
        """
        shown: list[Tensor] = []
        count = 0
        for sheet in self._job.sheets:
            shown.append(self._drawn(sheet, _MOST_IN_GRID - count))
            count += len(sheet.items)
            if count >= _MOST_IN_GRID:
                break
        path = self._folder.path / GRID
        save_image(path, shown[0] if len(shown) == 1 else stacked(shown))
        return path

    def write_animations(self) -> list[Path]:
        """A WebP file for every walk: `walk-SEED.webp`; returns their paths.

        Raises:
            OutputError, StorageError: writing failed.
        """
        paths = []
        for sheet in self._job.sheets:
            if sheet.is_walk:
                seed = self._job.items[sheet.items[0]].request.seed
                path = self._folder.path / f"walk-{seed}.webp"
                save_animation(path, [read_image(self._folder.file(i)) for i in sheet.items], _MILLISECONDS_PER_FRAME)
                paths.append(path)
        return paths

    def write_preview(self, images: Tensor) -> None:
        """preview.png of the pictures under way, uint8 [N, 3, H, W].

        Raises:
            OutputError, StorageError: writing failed.
        """
        save_image(self._folder.path / PREVIEW, image_grid(list(images), min(_WIDEST_PREVIEW, len(images))))

    def remove_preview(self) -> None:
        """What was under way is done."""
        (self._folder.path / PREVIEW).unlink(missing_ok=True)

    def _drawn(self, sheet: Sheet, limit: int) -> Tensor:
        whole_rows = max(1, limit // sheet.columns) * sheet.columns
        items = sheet.items[:whole_rows]
        there = {i: read_image(self._folder.file(i)) for i in items if self._folder.file(i).is_file()}
        size = next(((p.shape[1], p.shape[2]) for p in there.values()), (16, 16))
        pictures = [there[i] if i in there else placeholder(size) for i in items]
        if not sheet.column_labels:
            return image_grid(pictures, sheet.columns)
        return labelled_grid(pictures, sheet.column_labels, sheet.row_labels, sheet.title)
