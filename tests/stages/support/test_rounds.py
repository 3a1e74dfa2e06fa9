"""Measurements in rounds: their order, what is kept of them, and what is measured again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldm_cli.stages.support.rounds import Measured, measured_in_rounds
from ldm_cli.training.ranks import Ranks

NUM_BATCHES = 12  # two digits: order by number is not that by name


def measured(folder: Path | None, asked: list[int], stop_after: int = NUM_BATCHES) -> list[float]:
    """The numbers of the batches as measurements, in rounds of three; a failure after so many batches."""

    def measure(numbers: list[int]) -> Iterator[Measured]:
        for number in numbers:
            if len(asked) == stop_after:
                raise KeyboardInterrupt
            asked.append(number)
            yield {"number": torch.tensor([float(number)]), "square": torch.tensor([float(number**2)])}

    found = list(measured_in_rounds(range(NUM_BATCHES), measure, Ranks(), 3, folder))
    assert [float(one["square"]) for one in found] == [float(one["number"]) ** 2 for one in found]
    return [float(one["number"]) for one in found]


def test_measurements_come_in_the_order_of_the_batches(tmp_path: Path) -> None:
    for folder in (None, tmp_path / "new"):
        assert measured(folder, []) == list(range(NUM_BATCHES))


def test_finished_rounds_are_not_measured_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, [], stop_after=8)
    (tmp_path / ".tmp-00000006.safetensors").write_bytes(b"half")  # as a kill leaves it
    asked: list[int] = []
    assert measured(tmp_path, asked) == list(range(NUM_BATCHES))
    assert asked == list(range(6, NUM_BATCHES))
    asked.clear()
    assert measured(tmp_path, asked) == list(range(NUM_BATCHES))
    assert asked == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_what_follows_a_damaged_round_is_measured_again(tmp_path: Path, damage: str) -> None:
    measured(tmp_path, [])
    (file,) = tmp_path.glob("00000003-*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + (b"" if damage == "cut" else bytes([content[-1] ^ 1])))
    if damage == "missing":
        file.unlink()
    asked: list[int] = []
    assert measured(tmp_path, asked) == list(range(NUM_BATCHES))
    assert asked == list(range(3, NUM_BATCHES))
