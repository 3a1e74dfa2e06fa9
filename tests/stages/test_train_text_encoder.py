"""`train-unet` with `train_text_encoder`: U-Net and CLIP's text tower are trained together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ldm_cli.core.models.checkpointing import Checkpointed
from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.errors import RecipeError
from ldm_cli.families.open_family import open_family
from ldm_cli.families.stable_diffusion import StableDiffusion
from ldm_cli.formats.model_source import load_tensors
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.train_unet import DenoiserTask, parameters

from .test_precompute import assert_a_cache_changes_nothing
from .tiny import assert_resumes, losses, trained, unet_recipe, workbench


@pytest.fixture
def parts(scenes: Path, clip_run: Path, vae_run: Path) -> tuple[Path, Path, Path]:
    return scenes, clip_run / "model", vae_run / "model"


def together(parts: tuple[Path, Path, Path], **changes: Any) -> dict[str, Any]:
    return unet_recipe(*parts, **changes) | {"train_text_encoder": True}


def test_every_weight_of_the_tower_is_trained_and_averaged_and_transformers_opens_it(
    parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    trained(together(parts, steps=6, save_every=3, ema_decay=0.5), tmp_path)
    before = load_tensors(parts[1])
    raw, averaged = (load_tensors(tmp_path / f"checkpoints/step-00000006/{k}/{TEXT_ENCODER}") for k in ("model", "ema"))
    earlier = load_tensors(tmp_path / f"checkpoints/step-00000003/model/{TEXT_ENCODER}")
    # A bias that all keys share moves no attention: its gradient is rounding.
    names = [name for name in raw if not name.endswith("k_proj.bias")]
    assert len(names) > 15
    for other in (before, averaged, earlier):
        assert all((raw[name] != other[name]).any() for name in names)
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "model" / TEXT_ENCODER)
    family = open_family(tmp_path / "model")
    assert isinstance(family, StableDiffusion)
    ours = family.encoder.models[0]
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_loss_and_a_dropped_caption_trains_the_tower_too(
    parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Against a difference quotient, with and without captions; in parts of a batch as in the whole."""
    for dropout in (0.0, 1.0):
        recipe = TrainUnetRecipe.from_mapping(together(parts, diffusion={"caption_dropout": dropout}))
        shards = open_shards(recipe.data.shards, recipe.data, SilentReporter())
        task = DenoiserTask(recipe, workbench(recipe, tmp_path))
        for parameter in task.family.denoiser.parameters():
            if not parameter.any():  # last layers of a new U-Net
                torch.nn.init.normal_(parameter, std=0.3)
        tower = task.modules[TEXT_ENCODER]
        batch = task.prepare(next(Loader(shards, recipe.data, seed=0, batch_size=8).batches(0, 1)))

        def loss(num_parts: int, batch: Any = batch, task: DenoiserTask = task) -> torch.Tensor:
            return torch.stack([task.loss(part, 1)[0] for part in task.parts(batch, num_parts)]).mean()

        weight = tower.get_parameter("text_model.encoder.layers.0.mlp.fc1.weight")
        found = []
        for num_parts in (1, 2):
            tower.zero_grad()
            loss(num_parts).backward()  # type: ignore[no-untyped-call]
            assert weight.grad is not None
            found.append(weight.grad.clone())
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-8)
        assert found[0].norm() > 1e-3
        direction = found[0] / found[0].norm()
        ends = []
        for step in (0.05, -0.1):
            with torch.no_grad():
                weight.add_(direction, alpha=step)
                ends.append(loss(1).item())
        assert (ends[0] - ends[1]) / 0.1 == pytest.approx(found[0].norm().item(), rel=5e-2)


def test_a_run_that_is_lost_and_continued_ends_in_the_same_bits(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert_resumes(together(parts, steps=5, save_every=2, ema_decay=0.9), tmp_path, 2)


def test_recomputed_layers_change_only_rounding(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for name, is_recomputed in (("plain", False), ("recomputed", True)):
        recipe = together(parts, steps=3, log_every=1, save_every=3, gradient_checkpointing=is_recomputed)
        trained(recipe, tmp_path / name)
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    tower = DenoiserTask(
        TrainUnetRecipe.from_mapping(recipe), workbench(TrainUnetRecipe.from_mapping(recipe), tmp_path)
    ).modules[TEXT_ENCODER]
    layers = [module for module in tower.modules() if isinstance(module, Checkpointed)]
    assert layers
    assert all(layer.gradient_checkpointing for layer in layers)


def test_a_cache_holds_latents_alone_and_changes_nothing(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert_a_cache_changes_nothing(together(parts, steps=3, log_every=1, save_every=3), tmp_path)
    assert list((tmp_path / "cache").glob("latents-*"))
    assert not list((tmp_path / "cache").glob("text-*"))


def test_what_is_trained_is_counted_and_what_does_not_go_together_is_named(parts: tuple[Path, Path, Path]) -> None:
    alone, _ = parameters(TrainUnetRecipe.from_mapping(unet_recipe(*parts)), [])
    both, frozen = parameters(TrainUnetRecipe.from_mapping(together(parts)), [])
    tower = sum(t.numel() for name, t in load_tensors(parts[1]).items() if name.startswith("text_model."))
    assert both == alone | {TEXT_ENCODER: tower}
    assert frozen.keys() == {"vae"}
    with pytest.raises((ValidationError, RecipeError), match="train_text_encoder does not go with text_encoder_2"):
        TrainUnetRecipe.from_mapping(together(parts) | {"text_encoder_2": "x"})
    with pytest.raises((ValidationError, RecipeError), match="train_text_encoder does not work with"):
        TrainUnetRecipe.from_mapping(together(parts, strategy="sharded"))
    with pytest.raises((ValidationError, RecipeError), match="vae=pixels does not go with train_text_encoder"):
        TrainUnetRecipe.from_mapping(together(parts) | {"vae": "pixels"})
