"""`--data-trace`: a line per sample whatever its name, and only in a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldm_cli.data.batch import Batch
from ldm_cli.errors import OutputError
from ldm_cli.stages.support.data_trace import traced
from ldm_cli.training.ranks import Ranks


def batches(start: int, end: int) -> Iterator[Batch]:
    counter = torch.zeros(2, dtype=torch.int64)
    for _ in range(start, end):
        yield Batch(torch.empty(2, 0), [], None, ["a/plain", "a/two\nlines\x85and\u2028more"], counter, counter)


def test_a_name_with_line_breaks_takes_one_line(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    list(traced(batches, file, Ranks())(0, 2))
    list(traced(batches, file, Ranks())(1, 3))  # a second life, from the checkpoint of step 1
    lines = file.read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == ["1", "1", "2", "2", "3", "3"]
    assert lines[1] == r"1 a two\nlines\x85and\u2028more"


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_bytes(b"my notes\xff\n")
    with pytest.raises(OutputError, match="is no data trace"):
        list(traced(batches, file, Ranks())(0, 1))
    assert file.read_bytes() == b"my notes\xff\n"
