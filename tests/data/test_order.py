"""Order by exhaustion: every sample once an epoch, from any position, in any process."""

from __future__ import annotations

import time

import pytest
import torch

from ldm_cli.data.order import Order, global_positions, rank_slice

SIZES = (5, 0, 3, 7, 1, 0, 4)


def _epoch(order: Order, epoch: int) -> list[tuple[int, int]]:
    return [order(epoch, position) for position in range(order.num_samples)]


@pytest.mark.parametrize("window", [1, 2, 3, 100])
@pytest.mark.parametrize("epoch", [0, 1, 100])
def test_every_sample_comes_exactly_once_an_epoch(window: int, epoch: int) -> None:
    expected = {(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)}
    found = _epoch(Order(0, SIZES, window), epoch)
    assert len(found) == len(expected)
    assert set(found) == expected


def test_epochs_and_seeds_differ_and_repeat() -> None:
    orders = [_epoch(Order(seed, SIZES, 3), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert _epoch(Order(1, SIZES, 3), 2) == orders[-1]


def test_any_position_is_found_without_those_before_it() -> None:
    order = Order(3, SIZES, 2)
    walked = _epoch(order, 4)
    for position in range(sum(SIZES)):
        assert Order(3, SIZES, 2)(4, position) == walked[position]
    assert [order(4, position) for position in (19, 0, 7)] == [walked[position] for position in (19, 0, 7)]


def test_samples_move_within_a_window_and_shards_move_everywhere() -> None:
    sizes, window = [10] * 12, 3
    order = _epoch(Order(0, sizes, window), 0)
    windows = [{shard for shard, _ in order[start : start + 30]} for start in range(0, 120, 30)]
    assert all(len(shards) == window for shards in windows), "a window has its own shards alone"
    assert windows != [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 10, 11}], "shards are permuted"
    assert [shard for shard, _ in order[:30]] != sorted(shard for shard, _ in order[:30])


def test_each_place_of_the_order_is_uniform_over_the_samples() -> None:
    order = Order(7, (2, 2, 2), 3)
    counts = torch.zeros(6, 6)
    for epoch in range(300):
        for position, (shard, sample) in enumerate(_epoch(order, epoch)):
            counts[position, 2 * shard + sample] += 1
    chi_square = float(((counts - 50) ** 2 / 50).sum())
    assert chi_square < 25 + 5 * (2 * 25) ** 0.5  # 25 degrees of freedom


def test_a_late_epoch_costs_no_more_than_the_first() -> None:
    sizes = [1000] * 64

    def seconds(epoch: int) -> float:
        start = time.perf_counter()
        Order(0, sizes, 4)(epoch, 40_000)
        return time.perf_counter() - start

    first = min(seconds(0) for _ in range(3))
    assert min(seconds(10**6) for _ in range(3)) < 3 * first + 0.01


def test_steps_run_over_the_borders_of_epochs_and_drop_nothing() -> None:
    num_samples, batch_size = 7, 5
    stream = [global_positions(step, batch_size, num_samples) for step in range(7)]
    epoch, position = (torch.cat(part).tolist() for part in zip(*stream, strict=True))
    assert list(zip(epoch, position, strict=True)) == [divmod(p, num_samples) for p in range(35)]


def test_a_batch_may_be_longer_than_an_epoch() -> None:
    epoch, position = global_positions(1, 5, 2)
    assert epoch.tolist() == [2, 3, 3, 4, 4]
    assert position.tolist() == [1, 0, 1, 0, 1]


def test_ranks_share_a_batch_in_equal_parts() -> None:
    parts = [list(range(12))[rank_slice(12, rank, 3)] for rank in range(3)]
    assert [number for part in parts for number in part] == list(range(12))
    assert {len(part) for part in parts} == {4}
    for batch_size, rank, world_size in ((10, 0, 3), (12, 3, 3), (12, -1, 3)):
        with pytest.raises(ValueError, match=f"batch_size={batch_size}, rank={rank}"):
            rank_slice(batch_size, rank, world_size)


def test_misuse_names_the_values() -> None:
    with pytest.raises(ValueError, match="window=0"):
        Order(0, SIZES, 0)
    with pytest.raises(ValueError, match="0 samples in 2 shards"):
        Order(0, (0, 0), 1)
    with pytest.raises(ValueError, match=r"position=20 is not in \[0, 20\)"):
        Order(0, SIZES, 1)(0, 20)
