"""`--data-trace FILE`: which samples each step took, in the order of the global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ldm_cli.data.batch import Batch
from ldm_cli.errors import OutputError
from ldm_cli.inputs import read_input
from ldm_cli.storage import append_text, write_whole
from ldm_cli.training.ranks import Ranks

_MOST_BYTES = 2**34


def traced(
    batches: Callable[[int, int], Iterator[Batch]], file: Path, ranks: Ranks
) -> Callable[[int, int], Iterator[Batch]]:
    """`batches` (first step, end step), and a line `step shard key` in `file` for each sample they give.

    Steps count from 1, as in metrics.jsonl. Lines of an earlier process for these steps are dropped. Rank 0 writes
    the samples of all ranks, so the file is the same for any number of them.

    Raises:
        OutputError, StorageError: the file is something else, or cannot be written.
    """

    def stream(start: int, end: int) -> Iterator[Batch]:
        if ranks.is_first:
            _rewind(file, start)
        for step, batch in enumerate(batches(start, end), start=start + 1):
            lines = ranks.texts("".join(f"{line}\n" for line in batch.trace(step)))
            if ranks.is_first:
                append_text(file, "".join(lines))
            yield batch

    return stream


def _rewind(file: Path, step: int) -> None:
    text = read_input(file, _MOST_BYTES).decode("utf-8", "backslashreplace") if file.exists() else ""
    # A line cut short by a kill belongs to a step that is taken again.
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if any(not line.split(" ", 1)[0].isdecimal() for line in lines):
        raise OutputError(f"'{file}' is no data trace", "it has lines without a step", "give --data-trace another file")
    write_whole(file, "".join(line for line in lines if int(line.split(" ", 1)[0]) <= step))
