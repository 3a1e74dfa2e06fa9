"""A folder of pictures from one job: complete, missing some, or somebody else's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_cli import __version__
from ldm_cli.errors import OutputError
from ldm_cli.formats.json_file import write_json
from ldm_cli.sampling.images import image_grid, read_png, save_png, slug, text_chunks
from ldm_cli.sampling.pipeline import GeneratedImage, ImageRequest

RECORD = "images.json"
GRID = "grid.png"
_MOST_IN_GRID = 100


class JobFolder:
    """Where the pictures of a job go: one job to a folder; the same one completes it, another is refused.

    images.json is written first. It holds `job` (everything that decides what the pictures show; jobs are
    the same when it is, with the same `images`), `images` (file, prompt and seed of each) and `written_by`
    (versions and paths, for information).
    """

    def __init__(self, path: Path, job: Mapping[str, Any], requests: Sequence[ImageRequest]) -> None:
        """Plan a job.

        Args:
            path: the folder.
            job: JSON data.
            requests: the pictures, in order.
        """
        self.path, self.job = path, dict(job)
        self.images = [
            {
                "file": f"{i:05d}-{slug(request.prompt)}-{request.seed}.png",
                "prompt": request.prompt,
                "seed": request.seed,
            }
            for i, request in enumerate(requests)
        ]

    def claim(self, overwrite: bool, written_by: Mapping[str, Any]) -> list[int]:
        """Take the folder for this job; returns the indices of the pictures that are still to be drawn.

        Args:
            overwrite: delete what another job left here, and draw everything again.
            written_by: further entries of `written_by`.

        Raises:
            OutputError: the folder holds another job, or files of these names, or cannot be written.
            StorageError: writing failed.
        """
        before = self._read_record()
        files = [str(image["file"]) for image in self.images]
        same = before is not None and before.get("job") == self.job and before.get("images") == self.images
        if not same:
            theirs = [] if before is None else [str(image.get("file")) for image in before.get("images", [])]
            present = [n for n in {*theirs, *files, GRID} if Path(n).name == n and (self.path / n).exists()]
            if (present or before is not None) and not overwrite:
                raise OutputError(
                    f"'{self.path}' holds pictures of another job",
                    self._difference(before),
                    "choose another --out, or give --overwrite",
                )
            self._delete(present)
        elif overwrite:
            self._delete([name for name in [*files, GRID] if (self.path / name).exists()])
        versions = {"ldm": __version__, "torch": torch.__version__}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create '{self.path}'", error.strerror or str(error)) from error
        write_json(
            self.path / RECORD,
            {"job": self.job, "images": self.images, "written_by": {**versions, **written_by}},
        )
        return [i for i, name in enumerate(files) if not (self.path / name).is_file()]

    def add(self, image: GeneratedImage, index: int) -> None:
        """Write one picture, its text chunks included.

        Args:
            image: the picture.
            index: its place in the job.

        Raises:
            StorageError: writing failed.
        """
        entry = self.images[index]
        size = (image.pixels.shape[2], image.pixels.shape[1])
        save_png(self.path / str(entry["file"]), image.pixels, text_chunks(entry, self.job, size))

    def write_grid(self, columns: int) -> Path:
        """grid.png of the job's first hundred pictures; returns its path.

        Raises:
            StorageError: writing failed.
        """
        files = [self.path / str(image["file"]) for image in self.images[:_MOST_IN_GRID]]
        save_png(self.path / GRID, image_grid([read_png(file) for file in files], columns))
        return self.path / GRID

    def _read_record(self) -> dict[str, Any] | None:
        """images.json, None where there is none; an unreadable one is of another job."""
        try:
            content = json.loads((self.path / RECORD).read_bytes())
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise OutputError(f"'{self.path}' is not a folder", remedy="choose another --out") from error
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _difference(self, before: Mapping[str, Any] | None) -> str:
        """What differs, in a few words."""
        job = (before or {}).get("job")
        if not isinstance(job, dict):
            return "no images.json of ours is there"
        names = [name for name in self.job if job.get(name) != self.job[name]]
        if names == ["sampling"] and isinstance(job["sampling"], dict):
            names = [f"sampling.{n}" for n, v in self.job["sampling"].items() if job["sampling"].get(n) != v]
        return f"it differs in {', '.join(names) or 'its prompts or seeds'}"

    def _delete(self, names: Sequence[str]) -> None:
        try:
            for name in names:
                (self.path / name).unlink()
        except OSError as error:
            raise OutputError(f"cannot replace files in '{self.path}'", error.strerror or str(error)) from error
