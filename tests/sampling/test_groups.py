"""Who is drawn with whom; and lanes, which work side by side, each by itself, and stop together."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm_cli.sampling import groups
from ldm_cli.sampling.fixed_rows import enough
from ldm_cli.sampling.groups import Group, Lanes, by_one_thread, lanes_here, rounds


def planned(total: int, size: int, lanes: int, *, allowed: bool = True) -> list[list[Group]]:
    return list(rounds(total, size, lanes, lambda count: count + 100, lambda count: count + 200 if allowed else 0))


def test_all_are_drawn_once_and_in_order() -> None:
    for total, size, lanes in itertools.product(range(1, 40), (1, 2, 3, 8), (1, 2, 3, 8)):
        plan = planned(total, size, lanes)
        drawn = [i for group in itertools.chain(*plan) for i in range(group.start, group.start + group.count)]
        assert drawn == list(range(total))
        for side_by_side in plan:
            assert 1 <= len(side_by_side) <= lanes
            rows = side_by_side[0].rows - 200 if side_by_side[0].rows > 200 else side_by_side[0].count
            assert all(group.count <= rows <= size for group in side_by_side)


def test_groups_side_by_side_are_at_least_half_full() -> None:
    assert planned(7, 8, 2) == [[Group(0, 4, 204), Group(4, 3, 204)]]
    assert planned(6, 8, 2) == [[Group(0, 6, 106)]]
    assert planned(19, 8, 2) == [[Group(0, 8, 208), Group(8, 8, 208)], [Group(16, 3, 103)]]
    assert planned(3, 2, 2) == [[Group(0, 2, 202), Group(2, 1, 202)]]
    assert planned(3, 2, 3) == [[Group(0, 1, 201), Group(1, 1, 201), Group(2, 1, 201)]]


def test_images_of_which_one_fills_a_group_are_not_drawn_side_by_side() -> None:
    assert planned(2, 1, 2) == [[Group(0, 1, 101)], [Group(1, 1, 101)]]


def test_where_one_thread_may_not_draw_groups_are_drawn_one_after_the_other() -> None:
    expected = [[Group(0, 8, 108)], [Group(8, 8, 108)], [Group(16, 1, 101)]]
    assert planned(17, 8, 2, allowed=False) == planned(17, 8, 1) == expected


@pytest.mark.parametrize(("threads", "lanes"), [(1, 1), (2, 2), (8, 8), (9, 1), (64, 1)])
def test_there_is_a_lane_for_each_of_few_threads(threads: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups.torch, "get_num_threads", lambda: threads)
    assert lanes_here() == lanes


@pytest.mark.usefixtures("two_threads")
def test_lanes_work_at_the_same_time_each_with_one_thread() -> None:
    meeting = threading.Barrier(2, timeout=20)

    def task(number: int) -> Callable[[Callable[[], None]], Tensor]:
        def work(go_on: Callable[[], None]) -> Tensor:
            meeting.wait()
            go_on()
            return torch.tensor([number, torch.get_num_threads()])

        return work

    with Lanes(2) as lanes:
        results = [lanes.run([task(10 * i), task(10 * i + 1)]) for i in range(2)]
        alone = lanes.run([lambda go_on: torch.tensor([torch.get_num_threads()])])
    assert [[r.tolist() for r in pair] for pair in results] == [[[0, 1], [1, 1]], [[10, 1], [11, 1]]]
    assert alone[0].item() == 2


def test_what_one_lane_raises_stops_the_others_at_once() -> None:
    steps = 0

    def fails(go_on: Callable[[], None]) -> Tensor:
        raise ValueError("no")

    def goes_on(go_on: Callable[[], None]) -> Tensor:
        nonlocal steps
        for _ in range(10_000):
            go_on()
            steps += 1
            time.sleep(0.01)
        return torch.zeros(1)

    with pytest.raises(ValueError, match="no"), Lanes(2) as lanes:
        lanes.run([goes_on, fails])
    assert steps < 1000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ldm-lane")]


@pytest.mark.usefixtures("two_threads")
def test_one_thread_may_draw_what_it_draws_as_all_do() -> None:
    def agreeing(*numbers: int) -> Callable[[int], list[Tensor]]:
        return lambda n: [torch.arange(n) + (1e-6 if torch.get_num_threads() == 1 and n not in numbers else 0.0)]

    assert by_one_thread(lambda: [torch.tensor(torch.get_num_threads())])[0].item() == 1
    assert [enough(agreeing(3, 8), count, 8, alone=True) for count in (1, 2, 3, 4, 8)] == [8, 8, 3, 8, 8]
    assert [enough(agreeing(4), count, 8, alone=True) for count in (3, 4, 5, 8)] == [4, 4, 0, 0]
    assert [enough(agreeing(4), count, 8) for count in (3, 8)] == [3, 8]
