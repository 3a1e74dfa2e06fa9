"""Sums over parts: canonical ones are the same bits however many ranks share the parts."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ldm_cli.errors import RecipeError
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.gradient_sum import Block, CanonicalSum, PlainSum, TreeSum, blocks
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.weights import Weights


class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, board: dict[int, Tensor]) -> None:
        super().__init__(rank, world_size)
        self.barrier, self.board = barrier, board

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        (tensor,) = tensors
        self.board[self.rank] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(sum(self.board[rank] for rank in range(self.world_size)))
        self.barrier.wait()

    def copy_from(self, rank: int, tensor: Tensor) -> None:
        if rank == self.rank:
            self.board[rank] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(self.board[rank])
        self.barrier.wait()


def summed(parts: list[Tensor], world_size: int, is_canonical: bool) -> list[Tensor]:
    """What each rank gets."""
    barrier, board, results = threading.Barrier(world_size), {}, {}
    per_rank = len(parts) // world_size

    def work(rank: int) -> None:
        ranks = ThreadRanks(rank, world_size, barrier, board)
        weights = Weights({}, ranks)
        total = (CanonicalSum if is_canonical else PlainSum)(weights, per_rank)
        for part in parts[rank * per_rank : (rank + 1) * per_rank]:
            total.add(part.clone())
        results[rank] = total.finish()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world_size)]


def random_parts(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(50, generator=generator) * 10.0**i for i in torch.randint(-3, 4, (count,)).tolist()]


@pytest.mark.parametrize("count", [1, 6, 8, 12, 30])
def test_a_canonical_sum_has_the_same_bits_for_every_number_of_ranks(count: int) -> None:
    parts = random_parts(count)
    (expected,) = summed(parts, 1, True)
    torch.testing.assert_close(expected.double(), torch.stack(parts).double().sum(0), rtol=1e-5, atol=1e-3)
    for world_size in [n for n in range(2, count + 1) if count % n == 0]:
        for result in summed(parts, world_size, True):
            assert torch.equal(result, expected), world_size


def test_a_plain_sum_depends_on_the_ranks_but_in_the_last_bits_only() -> None:
    parts = random_parts(12)
    results = [summed(parts, world_size, False)[0] for world_size in (1, 2, 3, 4)]
    assert any(not torch.equal(result, results[0]) for result in results), "else the canonical sum is for nothing"
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(("start", "end"), [(0, 8), (0, 7), (3, 11), (5, 6), (4, 4)])
def test_blocks_cover_their_chunks_once_and_in_order(start: int, end: int) -> None:
    covered = [i for level, number in blocks(start, end) for i in range(number << level, (number + 1) << level)]
    assert covered == list(range(start, end))


def test_the_tree_adds_pairs_of_pairs() -> None:
    tree = TreeSum()
    for number, value in enumerate([1e8, 1.0, -1e8, 1.0]):
        tree.add(Block(0, number), torch.tensor(value))
    assert tree.total().item() == 0.0, "(1e8 + 1) + (-1e8 + 1) loses both ones in float32, from left to right only one"


def test_a_wrong_number_of_parts_is_misuse() -> None:
    total = CanonicalSum(Weights({}, Ranks()), 3)
    for part in random_parts(2):
        total.add(part)
    with pytest.raises(ValueError, match="2 parts where parts_per_rank=3"):
        total.finish()


def test_a_batch_that_cannot_be_divided_is_refused_with_its_sizes() -> None:
    config = TrainConfig(steps=1, batch_size=12, micro_batch=3)
    assert [config.parts_per_rank(n) for n in (1, 2, 3, 6)] == [4, 2, 2, 1]
    with pytest.raises(RecipeError, match=r"among 5 ranks: train.batch_size=12 is no multiple of 5 ranks"):
        config.parts_per_rank(5)
    with pytest.raises(RecipeError, match=r"no multiple of 1 ranks × 3 parts of at most train.micro_batch=4"):
        TrainConfig(steps=1, batch_size=10, micro_batch=4).parts_per_rank(1)
    with pytest.raises(RecipeError, match=r"among 13 ranks"):
        config.parts_per_rank(13)
    elastic = TrainConfig(steps=1, batch_size=16, deterministic="elastic")
    assert [elastic.parts_per_rank(n) for n in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert {elastic.part_size(n) for n in (1, 2, 4, 8)} == {2}
    with pytest.raises(RecipeError, match=r"makes 8 parts of 2 samples"):
        elastic.parts_per_rank(3)
