"""Adapters that are trained: their output is that of merged weights, their gradients those of peft."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.lora import Adapters, chosen_ranks
from ldm_cli.core.lora_config import LoRAConfig
from ldm_cli.errors import RecipeError


class Small(nn.Module):
    """A convolution, and linear layers with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"conv": nn.Conv2d(3, 6, 3, stride=2, padding=1), "point": nn.Conv2d(6, 4, 1)})
        self.attn = nn.ModuleDict({"to_q": nn.Linear(4, 5, bias=False), "out": nn.Linear(5, 7)})

    def forward(self, x: Tensor) -> Tensor:
        rows = self.block["point"](self.block["conv"](x)).flatten(2).transpose(1, 2)
        result: Tensor = self.attn["out"](self.attn["to_q"](rows))
        return result


def adapted(dora: bool = False, dropout: float = 0.0) -> tuple[Small, Adapters]:
    torch.manual_seed(0)
    model = Small()
    config = LoRAConfig(rank=2, alpha=3.0, targets=("all",), conv_rank=3, dora=dora, dropout=dropout)
    adapters = Adapters(model, chosen_ranks(model, config.targets, 2, 3), config)
    for parameter in adapters.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model, adapters


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tuned", [False, True])
def test_a_model_with_adapters_predicts_as_with_merged_weights(dora: bool, tuned: bool) -> None:
    model, adapters = adapted(dora)
    if tuned:
        tune_for_cpu(model)
    x, merged = torch.randn(2, 3, 8, 8), Small()
    merged.load_state_dict(model.state_dict())
    with torch.no_grad():
        for path, update in adapters.low_rank().items():
            layer = merged.get_submodule(path)
            layer.weight.copy_(update.applied(layer.weight))  # type: ignore[operator, union-attr]
        assert (model(x) - merged(x)).abs().max() <= 1e-5
    assert set(adapters.low_rank()) == {"block.conv", "block.point", "attn.to_q", "attn.out"}


def test_adapters_leave_names_and_weights_of_the_model_alone() -> None:
    torch.manual_seed(0)
    before, (model, _) = Small().state_dict(), adapted()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_new_adapters_change_no_bit() -> None:
    torch.manual_seed(0)
    model, x = Small().requires_grad_(False), torch.randn(2, 3, 8, 8)
    before = model(x)
    config = LoRAConfig()
    Adapters(model, chosen_ranks(model, ("attention",), 2), config)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_peft(dora: bool) -> None:
    model, adapters = adapted(dora)
    theirs = Small()
    theirs.load_state_dict(model.state_dict())
    settings = {"r": 2, "lora_alpha": 3.0, "rank_pattern": {"conv": 3}, "use_dora": dora}
    wrapped = peft.get_peft_model(
        theirs,  # type: ignore[arg-type]
        peft.LoraConfig(target_modules=["conv", "point", "to_q", "out"], **settings),  # type: ignore[arg-type]
    )
    layers = {path: wrapped.base_model.model.get_submodule(path) for path in adapters.low_rank()}
    with torch.no_grad():
        for path, update in adapters.low_rank().items():
            layer = layers[path]
            layer.lora_A["default"].weight.copy_(update.down)  # type: ignore[index, union-attr]
            layer.lora_B["default"].weight.copy_(update.up)  # type: ignore[index, union-attr]
            if update.magnitude is not None:
                held = layer.lora_magnitude_vector["default"].weight  # type: ignore[index, union-attr]
                held.copy_(update.magnitude.view_as(held))
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(2, 16, 7)
    (model(x) * weight).mean().backward()
    (wrapped(x) * weight).mean().backward()
    for path, adapter in adapters.modules_by_path.items():
        layer = layers[path]
        pairs = [(adapter.down, layer.lora_A["default"].weight), (adapter.up, layer.lora_B["default"].weight)]  # type: ignore[index, union-attr]
        if adapter.magnitude is not None:
            pairs.append((adapter.magnitude, layer.lora_magnitude_vector["default"].weight))  # type: ignore[index, union-attr]
        for ours, other in pairs:
            assert ours.grad is not None
            assert other.grad is not None
            assert (ours.grad - other.grad.view_as(ours.grad)).abs().max() <= 1e-6


def test_dropout_belongs_to_a_sample_and_not_to_its_batch() -> None:
    model, adapters = adapted(dropout=0.5)
    x, epoch, position = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    adapters.samples = epoch, position
    whole = model(x)
    adapters.samples = epoch[2:], position[2:]
    assert torch.allclose(model(x[2:]), whole[2:], atol=1e-6)
    adapters.eval()
    assert not torch.allclose(model(x[2:]), whole[2:], atol=1e-2)


def test_dropout_sets_its_share_to_zero_and_keeps_the_mean() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    adapters = Adapters(model, {"0": 1}, LoRAConfig(rank=1, dropout=0.2))
    for parameter in adapters.parameters():
        parameter.data.fill_(1.0)
    x = torch.ones(4000, 1)
    adapters.samples = torch.zeros(4000, dtype=torch.int64), torch.arange(4000)
    factors = model(x) - nn.functional.linear(x, model[0].weight, model[0].bias)
    dropped = factors.abs() < 1e-5
    assert torch.allclose(factors[~dropped], torch.tensor(1.25))
    assert dropped.float().mean() == pytest.approx(0.2, abs=0.03)  # 4.7 deviations


@pytest.mark.parametrize("dora", [False, True])
def test_outputs_under_autocast_keep_the_type_of_the_base(dora: bool) -> None:
    model, _ = adapted(dora)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 3, 8, 8)).dtype == torch.bfloat16


def test_updates_of_another_rank_or_kind_are_refused() -> None:
    _, adapters = adapted()
    updates = adapters.low_rank()
    adapters.load_low_rank(updates)
    for changed in (adapted(dora=True)[1].low_rank(), {path: updates[path] for path in list(updates)[1:]}):
        with pytest.raises(ValueError, match="modules differ in rank or kind"):
            adapters.load_low_rank(changed)


def test_recomputed_layers_give_the_same_gradients() -> None:
    model, adapters = adapted(dropout=0.3)
    x = torch.randn(4, 3, 8, 8)
    adapters.samples = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False, preserve_rng_state=False)):
        adapters.zero_grad()
        run(x).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in adapters.parameters() if parameter.grad is not None])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_targets_are_names_and_patterns_and_exceptions() -> None:
    model = Small()
    assert chosen_ranks(model, ("attention",), 4) == {"attn.to_q": 4, "attn.out": 4}
    assert chosen_ranks(model, ("all", "!*.out"), 4) == {"block.point": 4, "attn.to_q": 4}
    assert chosen_ranks(model, ("block.*",), 4, 2) == {"block.conv": 2, "block.point": 4}
    for targets, conv_rank, message in (
        (("*.to_v",), None, "no layer matches '\\*.to_v'"),
        (("block.conv",), None, "nothing to train"),
        (("attention",), 2, "conv_rank applies to nothing"),
    ):
        with pytest.raises(RecipeError, match=message):
            chosen_ranks(model, targets, 4, conv_rank)
