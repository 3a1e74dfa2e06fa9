"""The folder of the pictures of one job: empty, incomplete, complete, or of another job."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_cli.errors import LdmError, OutputError
from ldm_cli.inputs import MOST_PICTURE_BYTES, read_input
from ldm_cli.pictures.images import save_image, slug
from ldm_cli.pictures.provenance import IMAGES_FILE, VERSIONS, full_provenance, texts_of
from ldm_cli.storage import TEMPORARY_PREFIX, append_text, file_sha256, storage_errors, write_whole

CHECKSUMS = "images.sha256"
GRID = "grid.png"
PREVIEW = "preview.png"
_ANIMATION = re.compile(r"walk-\d+\.webp")
_LEAST_DIGITS = 5


class JobFolder:
    """The output folder of one job: the same job completes it, another job is refused.

    images.json is written first. It holds `job` (the provenance that all pictures share), `images` (file, prompt, seed
    and further provenance of each), `sources` (paths) and `versions`. Jobs with the same `job` and `images` are the
    same. images.sha256, as `sha256sum -c` reads it, has a line for each file that was written: a picture that differs
    from its line is generated again.
    """

    def __init__(
        self,
        path: Path,
        job: Mapping[str, Any],
        images: Sequence[Mapping[str, Any]],
        sources: Mapping[str, str],
        suffix: str = ".png",
        metadata: bool = True,
    ) -> None:
        """Plan a job.

        Args:
            job: JSON data: the provenance that all pictures share.
            images: JSON data: `prompt`, `seed` and the fields that differ, of each picture in order.
            sources: paths of models and pictures; they decide nothing.
            suffix: of the files, which decides their format.
            metadata: whether the files hold their provenance.
        """
        self.path, self.job, self.sources = path, {**job, "format": suffix[1:], "metadata": metadata}, dict(sources)
        digits = max(_LEAST_DIGITS, len(str(len(images) - 1)))
        self.images = [
            {"file": f"{i:0{digits}d}-{slug(image['prompt'])}-{image['seed']}{suffix}", **image}
            for i, image in enumerate(images)
        ]
        self._shared, self._has_metadata = dict(job), metadata

    def make(self) -> None:
        """Create the folder where it is missing.

        Raises:
            OutputError, StorageError: it cannot be made.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"'{self.path}' is not a folder", remedy="choose another --out")
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def claim(self, overwrite: bool, warn: Callable[[str], None]) -> list[int]:
        """Take the folder for this job; returns the indices of the missing pictures.

        Args:
            overwrite: delete pictures of this or another job, and generate all of them again.
            warn: receives a message for each damaged file.

        Raises:
            OutputError: the folder holds another job, or files of these names, or a picture that this job is made of
                is among them, or it cannot be written.
            StorageError: writing failed.
        """
        before, checksums = self._earlier(), self._checksums()
        files = [str(image["file"]) for image in self.images]
        same = before is not None and before.get("job") == self.job and before.get("images") == self.images
        content = {"job": self.job, "images": self.images, "sources": self.sources, "versions": VERSIONS}
        listing = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        own_sha256 = hashlib.sha256(listing.encode()).hexdigest()
        if not same and checksums.get(IMAGES_FILE) == own_sha256:
            same = True
            warn(f"'{self.path / IMAGES_FILE}' was damaged: it is written again")
        if overwrite or not same:
            theirs: list[str] = []
            if before is not None:
                theirs = [str(image.get("file")) for image in before.get("images", [])]
                theirs += [path.name for path in self.path.iterdir() if _ANIMATION.fullmatch(path.name)]
            present = [n for n in {*theirs, *files, GRID} if Path(n).name == n and (self.path / n).exists()]
            if (present or before is not None) and not overwrite:
                raise OutputError(
                    f"'{self.path}' holds pictures of another job",
                    self._difference(before),
                    "choose another --out, or give --overwrite",
                )
            self._make_way(present)
            checksums = {}
        whole = {IMAGES_FILE: own_sha256} | self._whole(files, checksums, warn)
        self._delete([path.name for path in self.path.glob(f"{TEMPORARY_PREFIX}*") if path.is_file()])
        write_whole(self.path / IMAGES_FILE, listing)
        write_whole(self.path / CHECKSUMS, "".join(f"{value}  {name}\n" for name, value in whole.items()))
        return self.missing()

    def missing(self) -> list[int]:
        """Indices of the pictures that do not exist."""
        return [i for i, image in enumerate(self.images) if not self.file(i).is_file()]

    def animation(self, seed: int) -> Path:
        """Path of the animation of a walk that begins with a seed."""
        return self.path / f"walk-{seed}.webp"

    def file(self, index: int) -> Path:
        """Path of a picture of the job."""
        return self.path / str(self.images[index]["file"])

    def add(self, pixels: Tensor, index: int) -> None:
        """Write one picture and its provenance.

        Args:
            pixels: uint8 [3, H, W].
            index: its place in the job.

        Raises:
            OutputError, StorageError: writing failed.
        """
        texts = None
        if self._has_metadata:
            provenance = full_provenance(self._shared, self.images[index], self.sources)
            texts = texts_of(provenance, (pixels.shape[1], pixels.shape[2]))
        file = self.file(index)
        save_image(file, pixels, texts)
        append_text(self.path / CHECKSUMS, f"{file_sha256(file)}  {file.name}\n")

    def _earlier(self) -> dict[str, Any] | None:
        """The content of images.json: None where there is none, {} where it cannot be read."""
        try:
            content = json.loads(read_input(self.path / IMAGES_FILE, MOST_PICTURE_BYTES))
        except (LdmError, ValueError, RecursionError):
            return {} if os.path.lexists(self.path / IMAGES_FILE) else None
        return content if isinstance(content, dict) else {}

    def _checksums(self) -> dict[str, str]:
        """SHA-256 by file name, as the folder has it; of several, the last one."""
        file = self.path / CHECKSUMS
        content = read_input(file, MOST_PICTURE_BYTES) if file.is_file() else b""
        lines = content.decode("utf-8", "replace").splitlines()
        return {name: value for value, separator, name in (line.partition("  ") for line in lines) if separator}

    def _whole(self, names: Sequence[str], checksums: Mapping[str, str], warn: Callable[[str], None]) -> dict[str, str]:
        """The checksums of the pictures that are as they were written; the others are deleted."""
        found = {}
        for name in names:
            path = self.path / name
            if path.is_file() and file_sha256(path) == checksums.get(name):
                found[name] = checksums[name]
            elif path.exists() or path.is_symlink():
                warn(f"'{path}' is not as it was written: it is deleted, to be generated again")
                self._delete([name])
        return found

    def _difference(self, before: Mapping[str, Any] | None) -> str:
        """How this job differs from the one in the folder, in a few words."""
        job = (before or {}).get("job")
        if not isinstance(job, dict):
            return "no images.json of ours is there"
        names = [name for name in {**self.job, **job} if job.get(name) != self.job.get(name)]
        for section in ("sampling", "edit"):
            ours, theirs = self.job.get(section), job.get(section)
            if names == [section] and isinstance(ours, dict) and isinstance(theirs, dict):
                names = [f"{section}.{n}" for n, v in ours.items() if theirs.get(n) != v]
        return f"it differs in {', '.join(names) or 'its prompts or seeds'}"

    def _make_way(self, names: Sequence[str]) -> None:
        """Delete these files, unless the job needs one of them."""
        needed = {Path(source).resolve() for source in self.sources.values()}
        if kept := [name for name in names if (self.path / name).resolve() in needed]:
            raise OutputError(
                f"'{self.path / kept[0]}' would be overwritten",
                "the new pictures are made of it",
                "choose another --out, or copy it elsewhere first",
            )
        self._delete(names)

    def _delete(self, names: Sequence[str]) -> None:
        for name in names:
            with storage_errors(self.path / name):
                (self.path / name).unlink()
