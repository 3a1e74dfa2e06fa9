"""The thread ahead: it computes by itself, so that whoever consumes keeps all cores."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from ldm_cli.data.prefetch import prefetched


def numbers_of_threads() -> Generator[int]:
    yield torch.get_num_threads()
    torch.ones(1 << 20).add(1.0)  # large enough to be shared out
    yield torch.get_num_threads()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("alone", "expected"), [(True, [1, 1, 2]), (False, [2, 2, 2])])
def test_only_the_thread_ahead_computes_alone(alone: bool, expected: list[int]) -> None:
    with prefetched(numbers_of_threads(), alone=alone) as items:
        assert [*items, torch.get_num_threads()] == expected
