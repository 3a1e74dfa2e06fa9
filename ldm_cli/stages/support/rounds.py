"""Measurements of batches of pictures, which ranks take turns in, and which survive a kill."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load, save
from torch import Tensor

from ldm_cli.errors import LdmError
from ldm_cli.inputs import read_input
from ldm_cli.storage import storage_errors, whole_file
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.shared_work import merged

Measured = dict[str, Tensor]
"""The measurements of one batch, by name."""
T = TypeVar("T")


def measured_in_rounds(
    batches: Iterable[T],
    measure: Callable[[list[T]], Iterable[Measured]],
    ranks: Ranks,
    batches_per_rank: int,
    folder: Path | None = None,
) -> Iterator[Measured]:
    """The measurements of each batch, in order, on the first rank; none on the others, which iterate as well.

    In a round every rank measures some batches, then all exchange them. So no more than a round is in memory. What a
    killed process had measured in finished rounds is read again, whatever the number of ranks is now.

    Args:
        batches: the same on every rank.
        measure: the measurements of several batches, on the CPU, in order.
        batches_per_rank: of a round.
        folder: where the first rank keeps the rounds, one file each; None: nowhere.

    Raises:
        OutputError, StorageError: a round cannot be written.
    """
    done = 0
    if folder is not None and ranks.is_first:
        for kept in _kept_rounds(folder):
            yield from kept.values()
            done = 1 + max(kept)
    done = int(ranks.from_first(str(done)))
    remaining = islice(batches, done, None)
    while together := list(islice(remaining, batches_per_rank * ranks.world_size)):
        numbers = range(done + ranks.rank, done + len(together), ranks.world_size)
        own = zip(numbers, measure(together[ranks.rank :: ranks.world_size]), strict=True)
        every = merged({f"{i} {name}": tensor for i, found in own for name, tensor in found.items()}, ranks)
        if folder is not None and ranks.is_first:
            _keep(folder, done, every)
        if ranks.is_first:
            yield from _by_batch(every).values()
        done += len(together)


def _by_batch(tensors: Mapping[str, Tensor]) -> dict[int, Measured]:
    """`{"3 psnr": x}` → `{3: {"psnr": x}}`, in the order of the batches."""
    found: dict[int, Measured] = defaultdict(dict)
    for name, tensor in tensors.items():
        number, _, measurement = name.partition(" ")
        found[int(number)][measurement] = tensor
    return dict(sorted(found.items()))


def _keep(folder: Path, first: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a round, in a file named by its first batch and its content."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / f"{first:08d}-{_hash(content)}.safetensors") as temporary:
        temporary.write_bytes(content)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _kept_rounds(folder: Path) -> Iterator[dict[int, Measured]]:
    """The rounds from the first one on, up to one of which there is no whole file."""
    expected = 0
    for file in sorted(folder.glob("[0-9]*.safetensors")):
        try:
            content = read_input(file, 2**34)
        except LdmError:
            continue
        if file.stem.partition("-")[2] != _hash(content):
            continue
        kept = _by_batch(load(content))
        if not kept or list(kept) != list(range(expected, expected + len(kept))):
            return
        yield kept
        expected += len(kept)
