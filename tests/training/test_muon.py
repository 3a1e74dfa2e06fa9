"""Muon against the singular value decomposition, and its guard against non-finite gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.training import muon
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.muon import Muon, is_hidden_matrix, orthogonalized
from ldm_cli.training.optim import GuardedOptimizers
from ldm_cli.training.weights import Weights


def _matrix(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("shape", [(24, 24), (16, 90), (90, 16)])
def test_the_update_has_the_gradients_singular_vectors_and_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = _matrix(*shape)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    inner = u.T @ orthogonalized([matrix])[0].double() @ v.T
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-4
    well_above_zero = s > 0.02 * s.norm()
    assert well_above_zero.sum() >= 12
    assert ((inner.diagonal()[well_above_zero] > 0.6) & (inner.diagonal()[well_above_zero] < 1.25)).all()


def test_five_steps_on_the_small_square_equal_five_newton_schulz_steps_on_the_matrix() -> None:
    matrix = _matrix(20, 50)
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalized([matrix])[0].double(), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(24, 24), (16, 90), (90, 16)])
def test_in_bfloat16_it_is_the_update_of_torch(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (nn.Parameter(_matrix(*shape)) for _ in range(2))
    in_bfloat16 = lambda matrices, dtype: orthogonalized(matrices, torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(muon, "orthogonalized", in_bfloat16)
    optimizers = (
        Muon([ours], lr=0.1, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),  # half our update
    )
    for step in range(3):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = _matrix(*shape) ** (step + 1)
            optimizer.step()
    # bfloat16 has eight bits, and rounding grows over five steps: both are about 1 % off the update in float32.
    update = theirs - _matrix(*shape)
    assert torch.linalg.vector_norm(ours - theirs) < 0.03 * torch.linalg.vector_norm(update)


def test_matrices_taken_together_come_out_as_those_taken_alone() -> None:
    matrices = [_matrix(*shape) for shape in ((16, 90), (16, 16), (90, 16), (16, 16))]
    for together, matrix in zip(orthogonalized(matrices), matrices, strict=True):
        torch.testing.assert_close(together, orthogonalized([matrix])[0], atol=1e-6, rtol=0)


def test_an_update_is_as_large_as_one_of_adamw_whatever_the_shape_and_the_size_of_the_gradient() -> None:
    for shape, factor in (((64, 64), 1e-4), ((32, 16, 3, 3), 1e3)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = factor * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([parameter], lr=0.1).step()
        assert 0.1 * 0.4 * 0.7 < parameter.square().mean().sqrt() < 0.1 * 0.4 * 1.2


def test_weight_decay_shrinks_by_lr_times_decay() -> None:
    one, other = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    for parameter, decay in ((one, 0.0), (other, 0.5)):
        parameter.grad = _matrix(4, 4)
        Muon([parameter], lr=0.1, weight_decay=decay).step()
    torch.testing.assert_close(one.detach() - other.detach(), torch.full((4, 4), 0.05))


def test_a_step_with_a_non_finite_gradient_changes_nothing_and_the_next_goes_on_as_if_it_had_not_been() -> None:
    parameters = [nn.Parameter(torch.ones(4, 6)) for _ in range(2)]
    optimizers = [Muon([parameter], lr=0.1, weight_decay=0.1) for parameter in parameters]
    for gradient, found_inf in ((_matrix(4, 6), 0.0), (torch.full((4, 6), torch.nan), 1.0), (_matrix(4, 6) ** 2, 0.0)):
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            if found_inf and parameter is parameters[1]:
                continue
            parameter.grad = gradient.clone()
            optimizer.found_inf = torch.tensor(found_inf)
            optimizer.step()
    assert torch.equal(parameters[0], parameters[1])
    assert parameters[0].isfinite().all()


def test_hidden_kernels_go_to_muon_and_the_edges_norms_and_biases_to_adamw() -> None:
    config = UNet2DConditionConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    hidden = {name for name, p in UNet2DConditionModel(config).named_parameters() if is_hidden_matrix(name, p)}
    assert "mid_block.resnets.0.conv1.weight" in hidden
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight" in hidden
    assert not {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"} & hidden
    assert not any(name.endswith(".bias") or "norm" in name for name in hidden)


def test_stored_momentum_continues_to_the_same_bits() -> None:
    def stepped(model: nn.Module, optimizers: GuardedOptimizers, steps: range) -> None:
        for step in steps:
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()
            loss.backward()
            optimizers.step(0.01, loss)

    def fresh() -> tuple[nn.Module, GuardedOptimizers]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        config = TrainConfig(steps=10, batch_size=5, optimizer="muon")
        return model, GuardedOptimizers(Weights({"model": model}), config, torch.device("cpu"))

    model, optimizers = fresh()
    stepped(model, optimizers, range(3))
    state = {name: value.clone() for name, value in optimizers.state().items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    stepped(model, optimizers, range(3, 6))

    again, resumed = fresh()
    again.load_state_dict(weights)
    resumed.load_state(state)
    stepped(again, resumed, range(3, 6))
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
