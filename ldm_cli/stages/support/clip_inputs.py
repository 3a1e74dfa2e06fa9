"""What the commands of `ldm clip` share: the model, the pictures with their captions, lists of texts, features."""

from __future__ import annotations

import hashlib
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli.data.tables import text_lines
from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.families.open_family import resolve_model
from ldm_cli.formats.hub import model_path, recorded
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.options import resolve_device
from ldm_cli.stages.support.picture_sets import PictureSet, open_pictures, upright
from ldm_cli.training.run_folder import environment

_TEXTS_PER_BATCH = 256
_MOST_NAMED = 5


@dataclass(frozen=True)
class ClipOptions:
    """What every command of `ldm clip` takes."""

    model: str
    """A CLIP: a folder, a run, a single file, or a name of the hub. Empty for `search`: that of the embeddings."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    batch_size: int = 64
    """Pictures per call of the image tower."""


class Clip:
    """A CLIP in use: unit vectors of pictures and texts, and the provenance of what comes out.

    Errors of the constructor are those of `fetch`, `resolve_model` and `CLIPFeatures.load`.
    """

    def __init__(self, options: ClipOptions, reporter: Reporter) -> None:
        self._batch_size, self._reporter = options.batch_size, reporter
        self._device = resolve_device(options.device)
        folder = resolve_model(model_path(options.model, (), None, reporter))
        self._features = CLIPFeatures.load(folder, self._device)
        self.logit_scale = self._features.logit_scale
        self.about = {
            "model": recorded(folder),
            "sha256": weights_sha256(folder),
            "processor": self._features.processor.to_hugging_face(),
        }
        self._sets: list[dict[str, Any]] = []

    def pictures(self, sets: Sequence[PictureSet]) -> tuple[Tensor, list[int]]:
        """Of all pictures that can be read, float32 [N, D] of length 1, and their numbers among all, ascending.

        A warning names the others.

        Raises:
            DataError: none can be read.
            StorageError: reading failed.
        """
        total, rows, done = sum(len(one.files) for one in sets), list[Tensor](), 0
        numbers, first, problems = list[int](), 0, list[str]()
        with self._reporter.progress("embedding pictures", total, unit="picture") as progress:
            for one in sets:
                digest, unreadable = hashlib.sha256(), dict[int, str]()
                for batch, hashes in one.batches(self._batch_size, unreadable=unreadable):
                    digest.update(bytes(hashes.flatten().tolist()))
                    rows.append(F.normalize(self._features.pictures(batch), dim=-1))
                    progress.update(done := done + len(batch))
                read = [number for number in range(len(one.files)) if number not in unreadable]
                numbers += [first + number for number in read]
                first += len(one.files)
                left_out = {one.files[number][0]: unreadable[number] for number in sorted(unreadable)}
                problems += [f"'{name}' ({cause})" for name, cause in left_out.items()]
                about = {"source": one.name, "num_pictures": len(read), "sha256": digest.hexdigest()}
                self._sets.append({**about, "unreadable": list(left_out)})
        if problems:
            shown = ", ".join(problems[:_MOST_NAMED]) + (", …" if len(problems) > _MOST_NAMED else "")
            if not rows:
                raise DataError("no picture can be read", shown)
            self._reporter.warn(f"{len(problems)} of {total} pictures cannot be read and are left out: {shown}")
        return torch.cat(rows), numbers

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Of all texts in order, float32 [N, D] of length 1; a warning tells how many were too long."""
        before, rows = self._features.num_truncated, list[Tensor]()
        with self._reporter.progress("embedding texts", len(texts), unit="text") as progress:
            for start in range(0, len(texts), _TEXTS_PER_BATCH):
                rows.append(F.normalize(self._features.texts(texts[start : start + _TEXTS_PER_BATCH]), dim=-1))
                progress.update(min(start + _TEXTS_PER_BATCH, len(texts)))
        if num_cut := self._features.num_truncated - before:
            self._reporter.warn(f"{num_cut} texts were too long for the CLIP and were cut")
        return torch.cat(rows)

    def provenance(self) -> dict[str, Any]:
        """The model, the pictures so far, date, machine and versions."""
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(self._device),
            "device": str(self._device),
            "clip": self.about,
            "pictures": self._sets,
        }


def open_picture_sets(sources: Sequence[str], reporter: Reporter) -> list[PictureSet]:
    """The pictures of each source, upright and over white, as a CLIP is trained here; errors as in `open_pictures`."""
    return [open_pictures(source, reporter, upright) for source in sources]


def picture_rows(sets: Sequence[PictureSet], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Source and name of the pictures with these numbers among all."""
    every = [{"source": one.name, "name": name} for one in sets for name, _ in one.files]
    return [every[number] for number in numbers]


def texts_of(given: str, what: str) -> list[str]:
    """The texts that an option means: the lines of a file of that name, else what is between its commas.

    What ends with `.txt` is a file. Blank ones are left out, and of equal ones all but the first.

    Args:
        what: the option, for the error.

    Raises:
        DataError: there is none, or the file cannot be read.
        InputNotFoundError: there is no such file.
    """
    is_file = os.path.isfile(given)  # noqa: PTH113 - Path raises OSError for a list that is too long for a name
    if given.endswith(".txt") and not is_file:
        raise InputNotFoundError(f"{what}: there is no '{given}'")
    lines = text_lines(Path(given), lambda remark: None) if is_file else given.split(",")
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise DataError(
            f"{what} '{given}' has no text", remedy="give texts between commas, or a file with one per line"
        )
    return found
