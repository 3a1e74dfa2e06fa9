"""`train-unet` of a transformer whose patches are left out, or compared with a CLIP's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from ldm_cli.errors import RecipeError
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.stages.train_unet import parameters
from tests.sampling.tiny import randomize

from .tiny import assert_resumes, trained
from .tiny_sd3 import save_tiny_sd3, sd3_recipe, tiny_sd3


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An autoencoder and two CLIP towers, untrained."""
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3"), has_t5=False, t5_length=0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP whose patches are 4 x 4, where the transformer's are 6 x 6."""
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = CLIPVisionConfig(**small, image_size=16, patch_size=4)
    config = CLIPConfig(text_config=CLIPTextConfig(**small, vocab_size=20), vision_config=vision)
    model = randomize(CLIPModel(config), 1)
    save_model(folder, model.state_dict(), config.to_hugging_face(), TRANSFORMERS_WEIGHTS)
    return str(folder)


def recipe(scenes: Path, parts: dict[str, str], patches: dict[str, Any], **train: Any) -> dict[str, Any]:
    return sd3_recipe(scenes, parts, **{"steps": 4, "save_every": 2, "log_every": 1, **train}) | {"patches": patches}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return open_family(folder).denoiser.state_dict()


def test_leaving_patches_out_changes_the_steps_before_the_whole_ones(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    masked = {"left_out": 0.75}
    for name, patches in {"plain": {}, "masked": masked, "never": {**masked, "whole_from": 0.0}}.items():
        trained(recipe(scenes, parts, patches), tmp_path / name)
    plain, found, never = (weights(tmp_path / name) for name in ("plain", "masked", "never"))
    assert all(torch.equal(plain[name], never[name]) for name in plain)
    assert not torch.equal(plain["proj_out.weight"], found["proj_out.weight"])


def test_a_lost_run_with_either_ends_in_the_same_weights_and_exports_no_projection(
    scenes: Path, parts: dict[str, str], clip: str, tmp_path: Path
) -> None:
    for name, patches in {"masked": {"left_out": 0.5}, "aligned": {"clip": clip, "aligned_block": 1}}.items():
        run = tmp_path / name / "whole"
        assert_resumes(recipe(scenes, parts, patches), tmp_path / name, 2)
        assert not (run / "model/projection").exists()
        assert set(weights(run)) == set(tiny_sd3(has_t5=False).denoiser.state_dict())
    assert '"alignment"' in (run / "metrics.jsonl").read_text()


def test_the_projection_counts_among_what_is_trained(scenes: Path, parts: dict[str, str], clip: str) -> None:
    own = TrainUnetRecipe.from_mapping(recipe(scenes, parts, {"clip": clip}))
    count, used = parameters(own, [])
    # Three layers: 16 to 32, 32 to 32, 32 to the tower's 8.
    assert count["projection"] == 17 * 32 + 33 * 32 + 33 * 8
    assert used["patches.clip"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patches": {"left_out": 0.5, "mixer_blocks": 3}}, "mixer_blocks=3, but transformer.num_layers=2"),
        ({"patches": {"clip": "x", "aligned_block": 3}}, "aligned_block=3, but transformer.num_layers=2"),
        ({"patches": {"clip": "x"}, "cache": "y"}, "looks at the images: leave cache out"),
    ],
)
def test_what_cannot_be_trained_so_is_named(
    scenes: Path, parts: dict[str, str], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        parameters(TrainUnetRecipe.from_mapping(recipe(scenes, parts, {}) | change), [])
