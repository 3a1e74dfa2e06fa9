"""Archives of arrays as numpy writes them, without numpy: a zip file of `.npy` members."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm_cli.errors import DataError
from ldm_cli.formats.npy import BROKEN, encoded, parsed
from ldm_cli.inputs import open_input
from ldm_cli.storage import whole_file


def read_npz(file: Path) -> dict[str, Tensor | str]:
    """The arrays of an archive by name, on the CPU; an array of one text is a string.

    Arrays of objects and of other types are left out: nothing is ever unpickled.

    Raises:
        DataError: the file is no archive of arrays, or damaged.
        InputNotFoundError, StorageError: it cannot be read.
    """
    found: dict[str, Tensor | str] = {}
    try:
        with open_input(file) as stream, zipfile.ZipFile(stream) as archive:
            for name in archive.namelist():
                if name.endswith(".npy") and (array := parsed(bytearray(archive.read(name)))) is not None:
                    found[name.removesuffix(".npy")] = array
    except (zipfile.BadZipFile, *BROKEN) as error:
        raise DataError(f"cannot read '{file}'", f"it is no .npz archive of arrays: {error}") from error
    return found


def write_npz(file: Path, arrays: Mapping[str, Tensor | str]) -> None:
    """Write an archive that `numpy.load` reads; the same arrays give the same bytes. Errors as in `whole_file`."""
    with whole_file(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), encoded(array), zipfile.ZIP_DEFLATED)
