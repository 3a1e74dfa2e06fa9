"""The counter-based generator against Random123's known answers, and the distributions made from it."""

from __future__ import annotations

import pytest
import torch

from ldm_cli import philox

ZEROS = ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))
ONES = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD))
PI = (
    (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
    (0xA4093822, 0x299F31D0),
    (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
)


def _counters(num_samples: int, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((num_samples,), epoch), torch.arange(num_samples)


@pytest.mark.parametrize(("counter", "key", "answer"), [ZEROS, ONES, PI])
def test_philox4x32_10_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    words = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == answer


def test_bits_are_the_blocks_of_counter_block_position_epoch() -> None:
    position = 5 * 2**32 + 7
    words = philox.bits(PI[1], torch.tensor([3]), torch.tensor([position]), 6)
    for block in (0, 1):
        counter = tuple(torch.tensor([c]) for c in (block, 7, 5, 3))
        expected = torch.cat(philox.philox4x32(counter, PI[1]))  # type: ignore[arg-type]
        assert words[0, 4 * block : 4 * block + 4].tolist() == expected[: 4 if block == 0 else 2].tolist()


def test_streams_differ_by_seed_purpose_epoch_and_position() -> None:
    epoch, position = _counters(1)
    draws = {
        tuple(philox.bits(philox.key(seed, purpose), epoch + e, position + p, 4)[0].tolist())
        for seed in (0, 1)
        for purpose in ("a", "b")
        for e in (0, 1)
        for p in (0, 1, 2**32)
    }
    assert len(draws) == 2 * 2 * 2 * 3


@pytest.mark.parametrize("shape", [(4, 8, 8), (3,), (5, 7)])
def test_numbers_of_a_sample_do_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    key = philox.key(3, "noise")
    epoch, position = _counters(29, epoch=2)
    whole = philox.normal(key, epoch, position, shape)
    assert whole.shape == (29, *shape)
    for cuts in ([1] * 29, [7, 22], [16, 13]):
        parts = zip(epoch.split(cuts), position.split(cuts), strict=True)
        assert torch.equal(torch.cat([philox.normal(key, e, p, shape) for e, p in parts]), whole)


def test_fewer_numbers_are_a_prefix_of_more() -> None:
    key, counters = philox.key(0, "u"), _counters(3)
    assert torch.equal(philox.uniform(key, *counters, 9)[:, :5], philox.uniform(key, *counters, 5))


def test_uniform_numbers_have_the_moments_of_the_unit_interval() -> None:
    u = philox.uniform(philox.key(1, "u"), *_counters(1000), 1000).double()
    assert 0 < u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1
    # Standard errors for 10⁶ numbers: mean 2.9e-4, variance 7.5e-5; five of them.
    assert abs(u.mean() - 1 / 2) < 1.5e-3
    assert abs(u.var() - 1 / 12) < 4e-4
    # Neighbours within a sample, and the same index of neighbouring samples, are uncorrelated (error 1e-3).
    centred = u - 0.5
    assert abs((centred[:, 1:] * centred[:, :-1]).mean() * 12) < 5e-3
    assert abs((centred[1:] * centred[:-1]).mean() * 12) < 5e-3


def test_normal_numbers_have_the_moments_of_the_standard_normal() -> None:
    z = philox.normal(philox.key(1, "z"), *_counters(1000), (1000,)).double()
    # Standard errors for 10⁶ numbers of mean, variance, skewness and fourth moment; five of them.
    assert abs(z.mean()) < 5e-3
    assert abs(z.pow(2).mean() - 1) < 7e-3
    assert abs(z.pow(3).mean()) < 2e-2
    assert abs(z.pow(4).mean() - 3) < 5e-2
    assert abs((z[:, 0::2] * z[:, 1::2]).mean()) < 7e-3  # the pair of Box and Muller


@pytest.mark.parametrize("high", [1, 3, 1000])
def test_integers_are_uniform_below_their_bound(high: int) -> None:
    draws = philox.integers(philox.key(2, "i"), *_counters(100), 3000, high)
    counts = torch.bincount(draws.flatten(), minlength=high).double()
    assert len(counts) == high
    expected = 300_000 / high
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square <= high - 1 + 5 * (2 * high) ** 0.5


@pytest.mark.parametrize("high", [0, -1, 2**31 + 1])
def test_integers_refuse_a_bound_outside_their_range(high: int) -> None:
    with pytest.raises(ValueError, match=str(high)):
        philox.integers(philox.key(0, "i"), *_counters(1), 1, high)
