"""How many rows a network computes: on a CPU a function of the image size, elsewhere as many as there are images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm_cli.sampling.fixed_rows import enough_rows, filled, images_per_call, row_groups

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def groups(num_images: int, num_pixels: int, device: torch.device = CPU) -> list[tuple[slice, int]]:
    return list(row_groups(num_images, images_per_call(2048, num_pixels), device, 3))


@pytest.mark.parametrize(("num_pixels", "rows"), [(64, 8), (256, 8), (480, 4), (1024, 2), (4096, 1)])
def test_on_a_cpu_rows_follow_from_the_image_size_alone(num_pixels: int, rows: int) -> None:
    for num_images in (1, 3, 8, 19):
        found = groups(num_images, num_pixels)
        assert {computed for _, computed in found} == {rows}
        assert [i for images, _ in found for i in range(images.start, images.stop)] == list(range(num_images))


@pytest.mark.parametrize("num_pixels", [64, 4096])
def test_off_the_cpu_each_image_costs_one_row(num_pixels: int) -> None:
    assert groups(7, num_pixels, GPU) == [(slice(0, 3), 3), (slice(3, 6), 3), (slice(6, 7), 1)]


def test_only_a_call_that_is_not_full_asks_how_many_rows_will_do() -> None:
    asked: list[tuple[int, int]] = []

    def enough(count: int, size: int) -> int:
        asked.append((count, size))
        return 4

    assert list(row_groups(11, 8, CPU, 3, enough)) == [(slice(0, 8), 8), (slice(8, 11), 4)]
    assert asked == [(3, 8)]


def test_a_call_is_filled_up_to_the_least_number_that_gives_the_same_bits() -> None:
    def agreeing_from(least: int) -> Callable[[int], Tensor]:
        return lambda n: torch.arange(n) + (0.0 if n >= least else 1e-6)

    assert [enough_rows(agreeing_from(least), 1, 8) for least in (1, 2, 3, 5)] == [1, 2, 4, 8]
    assert [enough_rows(agreeing_from(1), count, 8) for count in (3, 7)] == [3, 7]


def test_filling_repeats_the_last_row() -> None:
    assert filled(torch.tensor([[1], [2]]), 4)[:, 0].tolist() == [1, 2, 2, 2]
