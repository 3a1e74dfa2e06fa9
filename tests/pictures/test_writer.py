"""Pictures written by a thread: all of them, in order, not too many waiting, and failures where they are seen."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_cli.errors import StorageError
from ldm_cli.pictures import sheets, writer
from ldm_cli.pictures.job import Job
from ldm_cli.pictures.job_folder import JobFolder
from ldm_cli.pictures.sheets import Sheets
from ldm_cli.pictures.writer import written_meanwhile

PICTURE = torch.zeros(3, 8, 8, dtype=torch.uint8)


class Shelf:
    """Keeps what is written, once it is allowed to."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.written: list[int] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        if is_open:
            self.gate.set()

    def write(self, index: int, pixels: Tensor) -> None:
        assert self.gate.wait(20)
        self.written.append(index)
        self.threads.add(torch.get_num_threads())


def test_all_are_written_in_order_by_a_thread_that_computes_alone() -> None:
    shelf, before = Shelf(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with written_meanwhile(shelf.write) as hand_over:
            for index in range(50):
                hand_over(index, PICTURE)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert shelf.written == list(range(50))
    assert shelf.threads == {1}


def test_drawing_goes_on_while_a_picture_is_written() -> None:
    shelf = Shelf(is_open=False)
    with written_meanwhile(shelf.write) as hand_over:
        hand_over(0, PICTURE)
        hand_over(1, PICTURE)
        assert not shelf.written
        shelf.gate.set()
    assert shelf.written == [0, 1]


def test_drawing_waits_when_too_many_pictures_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_MOST_WAITING_BYTES", 3 * PICTURE.nbytes)
    shelf, handed = Shelf(is_open=False), []
    with written_meanwhile(shelf.write) as hand_over:
        for index in range(3):
            hand_over(index, PICTURE)
        fourth = threading.Thread(target=lambda: (hand_over(3, PICTURE), handed.append(3)))
        fourth.start()
        fourth.join(0.2)
        assert not handed
        shelf.gate.set()
        fourth.join(20)
        assert handed == [3]
    assert shelf.written == [0, 1, 2, 3]


@pytest.mark.parametrize("late", [False, True])
def test_a_failure_is_raised_and_nothing_is_written_after_it(late: bool) -> None:
    shelf = Shelf()

    def write(index: int, pixels: Tensor) -> None:
        if index == 2:
            raise StorageError("cannot write", "the disk is full")
        shelf.write(index, pixels)

    handed = 0
    with pytest.raises(StorageError, match="disk is full"), written_meanwhile(write) as hand_over:  # noqa: PT012
        for index in range(3 if late else 10_000):
            hand_over(index, PICTURE)
            handed += 1
    assert shelf.written == [0, 1]
    assert handed < 10_000


def test_what_was_drawn_before_an_interruption_is_written() -> None:
    shelf = Shelf()
    with pytest.raises(KeyboardInterrupt), written_meanwhile(shelf.write) as hand_over:  # noqa: PT012
        for index in range(5):
            hand_over(index, PICTURE)
        raise KeyboardInterrupt
    assert shelf.written == list(range(5))


def test_grids_that_take_long_are_drawn_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    written: list[float] = []

    def write_grid(self: Sheets) -> None:
        written.append(clock[0])
        clock[0] += 8.0

    monkeypatch.setattr(sheets.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Sheets, "write_grid", write_grid)
    drawn = Sheets(JobFolder(tmp_path, {}, [], {}), Job([], []))
    while clock[0] < 500:
        drawn.refresh()
        clock[0] += 1.0
    assert written[0] == 102.0
    assert all(after - before >= 168 for before, after in itertools.pairwise(written))
    assert len(written) == 3
