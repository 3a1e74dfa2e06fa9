"""Updates of weights against their closed forms, written out number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_cli.core.low_rank import Hadamard, Kronecker, LowRank, WeightUpdate


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


W, KERNEL = rand(6, 4), rand(6, 4, 3, 3)
A, B = rand(2, 4, seed=1), rand(6, 2, seed=2)
A2, B2 = rand(2, 4, seed=3), rand(6, 2, seed=4)
LEFT, RIGHT = rand(3, 2, seed=5), rand(2, 2, 3, 3, seed=6)


@pytest.mark.parametrize(
    ("update", "weight", "expected"),
    [
        (LowRank(A, B, 6.0), W, lambda o, i: 3.0 * sum(float(B[o, r] * A[r, i]) for r in range(2))),
        (
            Hadamard(A, B, A2, B2, 1.0),
            W,
            lambda o, i: 0.5 * float((B[o] * A[:, i]).sum()) * float((B2[o] * A2[:, i]).sum()),
        ),
    ],
)
def test_delta_is_the_formula(update: WeightUpdate, weight: Tensor, expected: object) -> None:
    delta = torch.tensor([[expected(o, i) for i in range(4)] for o in range(6)])  # type: ignore[operator]
    torch.testing.assert_close(update.delta(), delta)
    torch.testing.assert_close(update.applied(weight, -0.5), weight - 0.5 * delta)
    assert update.delta().shape == (6, 4)


def test_a_kronecker_product_repeats_its_right_factor() -> None:
    update = Kronecker(LEFT, RIGHT, 0.5)
    applied = update.applied(KERNEL)
    assert update.delta().shape == (6, 4, 3, 3)
    for o in range(6):
        for i in range(4):
            expected = KERNEL[o, i] + 0.5 * LEFT[o // 2, i // 2] * RIGHT[o % 2, i % 2]
            torch.testing.assert_close(applied[o, i], expected)


def test_a_linear_update_fits_the_weight_of_a_pointwise_convolution() -> None:
    update = LowRank(A, B, 2.0)
    torch.testing.assert_close(update.applied(W.view(6, 4, 1, 1)).flatten(1), update.applied(W))


def test_rows_have_the_norms_of_magnitudes_and_the_direction_of_the_update() -> None:
    magnitude = torch.arange(1.0, 7.0)
    applied = LowRank(A, B, 2.0, magnitude).applied(W, 0.25)
    torch.testing.assert_close(applied.norm(dim=1), magnitude)
    direction = W + 0.25 * B @ A
    torch.testing.assert_close(torch.cosine_similarity(applied, direction), torch.ones(6))
