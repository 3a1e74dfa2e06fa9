"""`ldm sample` and `ldm eval` with an autoregressive model: its settings, its provenance, its pictures again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.formats.png_metadata import read_provenance
from ldm_cli.pictures.provenance import recipe_of
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.recipe.schema import EvalRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import evaluate, sample
from ldm_cli.stages.support.options import RunOptions
from tests.sampling.tiny import tiny_tokenizer
from tests.sampling.tiny_ar import save_tiny_model
from tests.stages.tiny import save_random_clip

SAMPLING = {"guidance": 3.0, "temperature": 0.9, "top_p": 0.95, "images_per_prompt": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model of pictures of 32 px, and of a CLIP."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "model", grid=(16, 16))
    save_random_clip(folder / "clip", tiny_tokenizer())
    return folder


def made(home: Path, out: Path, repeated: dict[str, Any] | None = None, **changes: Any) -> list[Path]:
    recipe = {"command": "sample", "model": str(home / "model"), "prompts": ["a red circle"], "sampling": SAMPLING}
    recipe = recipe | changes if repeated is None else recipe_of(repeated) | {"model": recipe["model"]} | changes
    options = RunOptions(out=out, device="cpu")
    result = sample.run(SampleRecipe.from_mapping(recipe), options, SilentReporter(), repeated=repeated)
    return [Path(image["file"]) for image in result["images"]]


def test_pictures_are_repeated_from_their_own_settings(home: Path, tmp_path: Path) -> None:
    _, second = made(home, tmp_path / "pictures")
    provenance = read_provenance(second)
    assert provenance["sampling"]["temperature"] == 0.9
    assert not {"steps", "sampler", "eta"} & provenance["sampling"].keys()
    assert "scheduler" not in provenance
    assert "Steps" not in Image.open(second).info["parameters"]
    [again] = made(home, tmp_path / "again", provenance)
    assert Image.open(again).tobytes() == Image.open(second).tobytes()


def test_a_picture_of_another_model_is_not_repeated(home: Path, tmp_path: Path) -> None:
    first, _ = made(home, tmp_path / "pictures")
    provenance = read_provenance(first)
    provenance["weights"]["transformer"] = "0" * 64
    with pytest.raises(CheckpointError, match="the model's weights have changed"):
        made(home, tmp_path / "again", provenance)


def test_the_best_of_several_is_recorded_with_its_clip(home: Path, tmp_path: Path) -> None:
    best = {"candidates": 2, "clip": str(home / "clip")}
    sampling = SAMPLING | {"guidance": {"scale": 3.0, "best_of": best}, "images_per_prompt": 1}
    [picture] = made(home, tmp_path / "best", sampling=sampling)
    provenance = read_provenance(picture)
    assert provenance["sampling"]["guidance"]["best_of"] == best
    assert len(provenance["guidance_models"]["best_of"]) == 64
    [again] = made(home, tmp_path / "again", provenance)
    assert Image.open(again).tobytes() == Image.open(picture).tobytes()


def test_a_grid_over_settings_has_a_picture_for_each(home: Path, tmp_path: Path) -> None:
    sampling = SAMPLING | {"images_per_prompt": 1}
    files = made(home, tmp_path / "xy", sampling=sampling, xy=["temperature=0,1", "guidance.scale=1,3"])
    assert len({Image.open(file).tobytes() for file in files}) == 4


def test_settings_without_meaning_are_found_before_the_folder_is_made(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"sampling\.steps has no meaning for this model"):
        made(home, tmp_path / "out", sampling=SAMPLING | {"steps": 20})
    with pytest.raises(UsageError, match="takes no adapters"):
        made(home, tmp_path / "out", prompts=["a <lora:x:1>"], loras=[{"path": str(home / "x.safetensors")}])
    assert not (tmp_path / "out").exists()


def test_settings_of_tokens_are_refused_by_a_denoiser(unet_run: Path, tmp_path: Path) -> None:
    recipe = {"command": "sample", "model": str(unet_run), "prompts": ["a"], "sampling": {"top_k": 5, "steps": 2}}
    with pytest.raises(UsageError, match=r"sampling\.top_k has no meaning .* autoregressive"):
        sample.run(SampleRecipe.from_mapping(recipe), RunOptions(out=tmp_path, device="cpu"), SilentReporter())


def test_pictures_are_evaluated_at_several_settings(home: Path, scenes: Path, tmp_path: Path) -> None:
    best = {"scale": 3.0, "best_of": {"candidates": 2, "clip": str(home / "clip")}}
    section = {
        "pipeline": str(home / "model"),
        "clip": str(home / "clip"),
        "metrics": ["clip_score", "attribute_accuracy"],
        "num_samples": 4,
        "num_generated": 4,
        "sampling": SAMPLING,
        "sweep": {"guidance": [3.0, best]},  # the plain picture is one of the candidates
    }
    recipe = {"command": "eval", "data": {"shards": str(scenes / "val-*.tar"), "image_size": 32}, "eval": section}
    result = evaluate.run(
        EvalRecipe.from_mapping(recipe), RunOptions(out=tmp_path / "e", device="cpu"), SilentReporter()
    )
    plain, chosen = (point["metrics"]["clip_score"]["generated"]["mean_cosine"] for point in result["points"])
    assert chosen >= plain
    assert torch.tensor([plain, chosen]).isfinite().all()
    assert json.loads((tmp_path / "e/eval.json").read_text())["points"] == result["points"]
