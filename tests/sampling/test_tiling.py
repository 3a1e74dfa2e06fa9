from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from ldm_cli.sampling.tiling import in_parts, tiled, window_starts, windows


def test_windows_cover_everything_and_end_flush():
    for length in range(1, 40):
        for window, overlap in [(8, 4), (8, 0), (5, 2)]:
            starts = window_starts(length, window, overlap)
            covered = {i for start in starts for i in range(start, min(start + window, length))}
            assert covered == set(range(length))
            assert all(b - a <= window - overlap for a, b in pairwise(starts))
            assert starts[-1] == max(0, length - window)
    with pytest.raises(ValueError, match="overlap=8 with window=8"):
        window_starts(20, 8, 8)


def test_windows_begin_at_multiples_and_the_last_one_is_longer_where_the_end_is_none():
    for length in range(1, 200):
        starts = window_starts(length, 40, 10, 8)
        assert all(start % 8 == 0 for start in starts)
        assert all(b - a <= 30 for a, b in pairwise(starts))
        assert length - starts[-1] < 48
        covered = {(w.left, w.left + w.width) for w in windows(5, length, 40, 10, 8)}
        assert (starts[-1], length) in covered
        assert all(end - start == 40 for start, end in covered if end < length)
        assert sum(w.width for w in windows(5, length, 40, 0, 8)) == length


def test_padding_counts_at_the_ends_of_the_whole_alone():
    def padded(x):
        return F.avg_pool2d(x, 3, 1, 1)

    x = torch.randn(1, 1, 40, 75, generator=torch.Generator().manual_seed(0))
    assert (tiled(padded, x, 32, 16) - padded(x)).abs().max() < 1e-2


def test_windows_of_a_pointwise_function_change_nothing():
    x = torch.randn(2, 3, 21, 13, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tiled(torch.sin, x, 8, 4), torch.sin(x))


def test_scales_of_input_and_output_are_followed():
    x = torch.randn(1, 2, 24, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tiled(lambda p: F.avg_pool2d(p, 4), x, 3, 1, 4, 1), F.avg_pool2d(x, 4))
    up = lambda p: F.interpolate(p, scale_factor=2.0, mode="nearest")  # noqa: E731
    torch.testing.assert_close(tiled(up, x, 8, 2, 1, 2), up(x))


def test_every_window_has_the_asked_size_and_small_pictures_go_through_whole():
    seen = []

    def note(x):
        seen.append(tuple(x.shape[-2:]))
        return x

    tiled(note, torch.zeros(1, 1, 20, 9), 8, 4)
    assert set(seen) == {(8, 8)}
    seen.clear()
    tiled(note, torch.zeros(1, 1, 8, 7), 8, 4)
    in_parts(note, torch.zeros(1, 1, 99, 99), None, 1, 1)
    assert seen == [(8, 7), (99, 99)]


def test_windows_that_disagree_fade_into_one_another():
    numbers = iter(range(100))
    steps = tiled(lambda p: torch.full_like(p, float(next(numbers))), torch.zeros(1, 1, 8, 20), 8, 4)[0, 0, 0]
    assert steps[0] == 0
    assert steps[-1] == 3
    rises = steps.diff()
    assert bool((rises >= 0).all())
    assert rises.max() < 0.5
