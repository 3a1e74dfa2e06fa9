"""The task that trains adapters: what of a batch it drops, where gradients go, what it writes and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldm_cli.core.lora_config import LoRAConfig
from ldm_cli.data.batch import Batch
from ldm_cli.errors import RecipeError
from ldm_cli.stages.support import lora_task
from ldm_cli.stages.support.lora_task import LoRATask
from tests.sampling.tiny import randomize
from tests.stages.test_train_unet import make_task


@pytest.fixture
def make(scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path) -> Callable[..., tuple[LoRATask, Batch]]:
    """Makes a task of a random denoiser and random adapters, and a prepared batch."""

    def made(recipe: dict[str, Any] | None = None, **lora: Any) -> tuple[LoRATask, Batch]:
        base, loader = make_task((scenes, clip_run / "model", vae_run / "model"), tmp_path, **recipe or {})
        randomize(base.family.denoiser, 3)
        changed = base.recipe.model_copy(update={"seed": lora.pop("seed", 0)})
        config = LoRAConfig.from_mapping({"rank": 2, "targets": ["attention"], **lora})
        torch.manual_seed(0)
        task = LoRATask(base, changed, config, base.bench)
        for adapters in task.modules.values():
            for parameter in adapters.parameters():
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        return task, task.prepare(next(loader.batches(0, 1)))

    return made


def gradients(task: LoRATask, batch: Batch, name: str) -> list[Tensor]:
    """Of the adapters of one network, after one more step."""
    task.modules[name].zero_grad()
    task.loss(batch, 1)[0].backward()  # type: ignore[no-untyped-call]
    return [torch.zeros(1) if p.grad is None else p.grad for p in task.modules[name].parameters()]


def test_text_encoders_learn_from_captions_and_from_dropped_ones(make: Callable[..., tuple[LoRATask, Batch]]) -> None:
    for dropped in (0.0, 1.0):
        task, batch = make({"diffusion": {"caption_dropout": dropped}}, text_encoder=True, dropout=0.2)
        first, second = (gradients(task, batch, "text_encoder") for _ in range(2))
        assert all(gradient.abs().max() > 0 for gradient in first), dropped
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_dropout_of_inputs_follows_the_seed_and_begins_with_training(
    make: Callable[..., tuple[LoRATask, Batch]],
) -> None:
    found = {}
    for name, lora in (("none", {}), ("one", {"dropout": 0.5}), ("other", {"dropout": 0.5, "seed": 3})):
        task, batch = make(**lora)
        found[name] = [float(task.loss(batch, 1)[0])]
        for adapters in task.modules.values():
            adapters.eval()
        found[name].append(float(task.loss(batch, 1)[0]))
    assert len({losses[0] for losses in found.values()}) == 3
    assert found["none"][0] == found["none"][1] == found["one"][1] == found["other"][1]


@pytest.mark.parametrize(
    ("width", "version", "architecture"),
    [(16, "sd_v1", "stable-diffusion-v1/lora"), (1024, "sd_v2", "stable-diffusion-v2-512/lora")],
)
def test_the_file_for_web_interfaces_says_what_it_was_trained_on(
    width: int,
    version: str,
    architecture: str,
    make: Callable[..., tuple[LoRATask, Batch]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, _ = make({"lr": 3e-4}, seed=5)
    denoiser = task._base.family.denoiser
    monkeypatch.setattr(denoiser, "config", denoiser.config.model_copy(update={"cross_attention_dim": width}))  # type: ignore[operator, union-attr]
    task.export(tmp_path / "model", {name: adapters.state_dict() for name, adapters in task.modules.items()})
    for file in ("tiny.safetensors", "pytorch_lora_weights.safetensors"):
        with safe_open(tmp_path / "model" / file, "pt") as opened:
            found = opened.metadata()
        assert (
            found
            | {
                "ss_base_model_version": version,
                "modelspec.architecture": architecture,
                "modelspec.resolution": "32x32",
                "ss_resolution": "(32, 32)",
                "ss_max_train_steps": "12",
                "ss_total_batch_size": "8",
                "ss_learning_rate": "0.0003",
                "ss_optimizer": "adamw",
                "ss_seed": "5",
            }
            == found
        )


def test_averaged_weights_are_written_where_they_are_given(
    make: Callable[..., tuple[LoRATask, Batch]], tmp_path: Path
) -> None:
    task, _ = make()
    averages = {name: torch.full_like(value, 0.25) for name, value in task.modules["unet"].state_dict().items()}
    task.export(tmp_path, {"unet": averages})
    task.restore(tmp_path)
    assert all((value == 0.25).all() for value in task.modules["unet"].state_dict().values())


def test_networks_are_compiled_where_the_recipe_says_so(
    make: Callable[..., tuple[LoRATask, Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(lora_task, "compile_regions", compiled.append)
    task, _ = make({"compile": True}, text_encoder=True)
    assert compiled == [task._base.family.denoiser, *task._base.encoder.encoder.models]
    make({"compile": False})
    assert len(compiled) == 2


def test_a_base_in_half_precision_needs_steps_in_half_precision(make: Callable[..., tuple[LoRATask, Batch]]) -> None:
    with pytest.raises(RecipeError, match=r"lora.base_precision=bf16 cannot be used: train.precision is fp32"):
        make({"precision": "fp32"}, base_precision="bf16")
