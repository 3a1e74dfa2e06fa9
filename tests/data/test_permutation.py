"""Permutations of which any place is found by itself."""

from __future__ import annotations

import pytest
import torch

from ldm_cli.data.permutation import Permutation


@pytest.mark.parametrize("size", [*range(1, 40), 1000, 9973, 2**16])
def test_every_number_has_one_place_and_one_by_one_is_as_all_at_once(size: int) -> None:
    permutation = Permutation("a", size)
    numbers = permutation.at(torch.arange(size))
    assert torch.equal(numbers.sort()[0], torch.arange(size))
    for place in (0, size // 3, size - 1):
        assert permutation(place) == int(numbers[place])


def test_places_of_huge_permutations_are_found_and_do_not_meet() -> None:
    size = 2**62
    permutation = Permutation("a", size)
    places = [0, 1, 2**31, 2**61 + 5, size - 1]
    found = [permutation(place) for place in places]
    assert permutation.at(torch.tensor(places)).tolist() == found
    assert len(set(found)) == 5
    assert all(0 <= number < size for number in found)


def test_each_number_is_as_often_at_each_place_over_many_names() -> None:
    counts = torch.zeros(7, 7)
    for name in range(1400):
        counts[torch.arange(7), Permutation(f"{name}", 7).at(torch.arange(7))] += 1
    chi_square = float(((counts - 200) ** 2 / 200).sum())
    assert chi_square < 36 + 5 * (2 * 36) ** 0.5


def test_neighbours_are_sent_apart() -> None:
    """The mean distance of neighbours after a permutation of n numbers is n/3."""
    numbers = Permutation("a", 10_000).at(torch.arange(10_000)).double()
    assert abs(float(numbers.diff().abs().mean()) - 10_000 / 3) < 100


def test_misuse_names_the_values() -> None:
    with pytest.raises(ValueError, match="size=0"):
        Permutation("a", 0)
    with pytest.raises(ValueError, match="place=5"):
        Permutation("a", 5)(5)
