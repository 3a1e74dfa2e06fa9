"""How codes are found: straight-through gradients, running means, restarts, the grid."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ldm_cli.core.codebook import RunningCodebook, codebook_loss, commitment_loss, grid_codes, perplexity, usage
from ldm_cli.core.codebook_config import CodebookConfig
from ldm_cli.core.models.vq_model import VectorQuantizer, straight_through
from ldm_cli.training.running_statistics import RunningStatistics

KEPT, SKIPPED = torch.tensor(1.0), torch.tensor(0.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(codes: Tensor) -> VectorQuantizer:
    made = VectorQuantizer(*codes.shape)
    with torch.no_grad():
        made.embedding.weight.copy_(codes)
    return made


def test_straight_through_has_the_value_of_the_codes_and_passes_gradients_on_exactly() -> None:
    z, codes, upstream = normal(2, 3, 4, 4).requires_grad_(), normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2)
    result = straight_through(z, codes)
    result.backward(upstream)
    assert torch.equal(result, codes)
    assert torch.equal(z.grad, upstream)


def test_the_two_terms_are_one_squared_distance_with_gradient_for_one_side_each() -> None:
    z, codes = normal(2, 3, 4, 4).requires_grad_(), normal(2, 3, 4, 4, seed=1).requires_grad_()
    both = ((z - codes) ** 2).mean()
    expected = torch.autograd.grad(both, (z, codes))
    commitment, of_codes = commitment_loss(z, codes), codebook_loss(z, codes)
    assert commitment.item() == of_codes.item() == pytest.approx(both.item())
    (by_z,) = torch.autograd.grad(commitment, z, retain_graph=True)
    (by_codes,) = torch.autograd.grad(of_codes, codes, retain_graph=True)
    torch.testing.assert_close((by_z, by_codes), expected)
    assert torch.autograd.grad(commitment, codes, allow_unused=True) == (None,)
    assert torch.autograd.grad(of_codes, z, allow_unused=True) == (None,)


def test_the_nearest_code_is_found_and_of_two_equal_ones_the_first() -> None:
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    z = torch.tensor([[0.9, 0.2], [-3.0, 0.1], [4.0, 9.0]]).T.view(1, 2, 1, 3)
    made = quantizer(codes)
    assert made.nearest(z).tolist() == [[[1, 0, 3]]]
    assert torch.equal(made.codes(made.nearest(z))[0, :, 0].T, codes[[1, 0, 3]])


@pytest.mark.parametrize("levels", [(3,), (2, 4), (5, 4, 3)])
def test_the_nearest_code_of_a_grid_is_each_channel_rounded_and_clamped(levels: tuple[int, ...]) -> None:
    codes = grid_codes(levels)
    assert len({tuple(code.tolist()) for code in codes}) == len(codes) == math.prod(levels)
    z = 1.5 * normal(2, len(levels), 5, 5)
    indices = quantizer(codes).nearest(z)
    expected = torch.zeros_like(indices)
    weight = 1
    for channel, count in enumerate(levels):
        half = count // 2
        digits = (z[:, channel] * half).round().clamp(-half, count - 1 - half) + half
        expected += weight * digits.long()
        weight *= count
    assert torch.equal(indices, expected)


def test_perplexity_is_the_number_of_equally_used_codes() -> None:
    assert perplexity(usage(torch.tensor([0, 3, 3, 0]), 8)).item() == pytest.approx(2)
    assert perplexity(usage(torch.arange(8), 8)).item() == pytest.approx(8)
    shares = usage(torch.tensor([1, 1, 1, 2]), 4)
    assert shares.tolist() == [0, 0.75, 0.25, 0]
    assert perplexity(shares).item() == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def step(
    running: RunningCodebook, made: VectorQuantizer, parts: list[Tensor], candidates: list[Tensor], kept: Tensor = KEPT
) -> None:
    """What the trainer does with the parts of one batch."""
    statistics = RunningStatistics([running])
    statistics.begin_step()
    changes = []
    for z, given in zip(parts, candidates, strict=True):
        running.observe(z, made.nearest(z), given)
        changes.append(torch.cat(statistics.take_change()))
    statistics.apply(torch.stack(changes).mean(dim=0), kept)


def test_codes_are_the_running_means_of_their_vectors_whatever_the_parts() -> None:
    """Against the definition: N and Σz of whole batches, decayed, and their ratio."""
    codes, decay = normal(4, 2), 0.8
    batches = [normal(6, 2, 3, 3, seed=seed) for seed in range(1, 5)]
    results = []
    for num_parts in (1, 2, 3):
        made = quantizer(codes)
        running = RunningCodebook(made, decay, 0.0, is_trained=True)
        for batch in batches:
            step(running, made, list(batch.chunk(num_parts)), [torch.zeros(4, 2)] * num_parts)
        results.append(made.embedding.weight)
    size, total, expected = torch.full((4,), 54.0 / 4), codes * 54 / 4, codes
    for batch in batches:
        vectors = batch.permute(0, 2, 3, 1).reshape(-1, 2)
        owner = torch.cdist(vectors, expected).argmin(dim=1)
        for code in range(4):
            mine = vectors[owner == code]
            size[code] = decay * size[code] + (1 - decay) * len(mine)
            total[code] = decay * total[code] + (1 - decay) * mine.sum(dim=0)
        expected = total / size[:, None]
    assert (expected - codes).abs().max() > 0.1
    for result in results:
        torch.testing.assert_close(result.data, expected)


def test_a_code_that_is_not_used_starts_again_at_its_candidate_and_the_others_stay() -> None:
    codes = torch.tensor([[0.0, 0.0], [100.0, 100.0]])
    made, z = quantizer(codes), 0.1 * normal(2, 2, 2, 2)
    running = RunningCodebook(made, decay=0.5, restart_below=0.2, is_trained=True)
    nothing, candidates = torch.zeros(2, 2), torch.tensor([[7.0, 7.0], [1.0, 2.0]])
    for _ in range(2):
        step(running, made, [z], [candidates])
        assert running.num_dead() == 0
        torch.testing.assert_close(made.embedding.weight[1].data, codes[1])
    step(running, made, list(z.chunk(2)), [2 * candidates, nothing])  # 0.125 of an equal share
    assert torch.equal(made.embedding.weight[1].data, candidates[1])
    assert made.embedding.weight[0].abs().max() < 1
    assert running.cluster_size[1] == 1
    assert torch.equal(running.embed_avg[1], candidates[1])
    assert not running.candidates.any()


def test_a_fresh_codebook_starts_at_vectors_of_the_first_batch() -> None:
    made = quantizer(0.01 * normal(4, 2))
    running = RunningCodebook(made, decay=0.99, restart_below=0.1, is_trained=False)
    z, candidates = 5 + normal(2, 2, 4, 4), normal(4, 2, seed=3)
    step(running, made, [z], [candidates])
    assert torch.equal(made.embedding.weight.data, candidates)


def test_a_skipped_step_changes_nothing() -> None:
    for is_trained in (True, False):
        made = quantizer(normal(4, 2))
        running = RunningCodebook(made, decay=0.5, restart_below=0.9, is_trained=is_trained)
        before = {name: value.clone() for name, value in (running.state_dict() | made.state_dict()).items()}
        step(running, made, [torch.full((2, 2, 3, 3), math.nan)], [torch.full((4, 2), math.nan)], SKIPPED)
        assert all(
            torch.equal(value, before[name]) for name, value in (running.state_dict() | made.state_dict()).items()
        )


def test_without_restarts_a_code_that_nothing_is_near_stays_where_it_is() -> None:
    codes = torch.tensor([[0.0, 0.0], [100.0, 100.0]])
    made = quantizer(codes)
    running = RunningCodebook(made, decay=0.01, restart_below=0.0, is_trained=True)
    for seed in range(6):
        step(running, made, [normal(2, 2, 2, 2, seed=seed)], [torch.zeros(2, 2)])
    torch.testing.assert_close(made.embedding.weight[1].data, codes[1])


def test_levels_belong_to_one_kind_and_to_the_size_of_the_codebook() -> None:
    for kind, levels in itertools.product(("ema", "gradient", "fsq"), ([], [3, 2])):
        if (kind == "fsq") == bool(levels):
            CodebookConfig.from_mapping({"kind": kind, "levels": levels}).expect_fitting(6, 2)
        else:
            with pytest.raises(ValueError, match="kind=fsq needs levels"):
                CodebookConfig.from_mapping({"kind": kind, "levels": levels})
    with pytest.raises(ValueError, match="are 6 codes of 2 channels, vq has 7 of 2"):
        CodebookConfig.from_mapping({"kind": "fsq", "levels": [3, 2]}).expect_fitting(7, 2)
