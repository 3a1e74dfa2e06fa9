"""`ldm cascade`: models that generate and enlarge, as one folder that `sample` takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.errors import CheckpointError, OutputError, UsageError
from ldm_cli.families.cascade import Cascade
from ldm_cli.families.family import Family
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.formats.png_metadata import read_provenance
from ldm_cli.pictures.images import read_image
from ldm_cli.pictures.provenance import recipe_of as recipe_of_picture
from ldm_cli.recipe.cascade_recipe import CascadeRecipe
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.upscaling import Upscaling, upscale
from ldm_cli.stages import cascade, sample
from ldm_cli.stages.support.options import RunOptions

from .test_train_pixels import pixel_recipe
from .tiny import trained

REQUESTS = [ImageRequest("a red circle", 3), ImageRequest("a blue square", 4)]
SETTINGS: list[dict[str, Any]] = [
    {"sampling": {"steps": 3, "guidance": {"scale": 2.0}}},
    {"sampling": {"steps": 2, "sampler": "ddim", "guidance": {"scale": 1.0}}, "noise_level": 5},
]


@pytest.fixture(scope="module")
def runs(scenes: Path, clip_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model of pictures of 16 px, and one that enlarges twofold."""
    folder = tmp_path_factory.mktemp("cascade")
    train = {"steps": 3, "lr": 3e-2}
    trained(pixel_recipe(scenes, clip_run / "model", data={"image_size": 16}, **train), folder / "base")
    large = pixel_recipe(scenes, clip_run / "model", **train)
    large["unet"] |= {"in_channels": 6, "class_embed_type": "timestep"}
    trained(large | {"low_resolution": {"factor": 2, "noise_augmentation": 30}}, folder / "large")
    return [str(folder / "base"), str(folder / "large")]


def recipe_of(models: list[str], settings: list[dict[str, Any]]) -> CascadeRecipe:
    stages = [{"model": model, **own} for model, own in zip(models, settings, strict=True)]
    return CascadeRecipe.from_mapping({"command": "cascade", "name": "tiny", "stages": stages})


@pytest.fixture
def folder(runs: list[str], tmp_path: Path) -> Path:
    out = tmp_path / "cascade"
    found = cascade.run(recipe_of(runs, SETTINGS), out, SilentReporter())
    assert found["size"] == [32, 32]
    return out


def generated(folder: Path, **fields: Any) -> Tensor:
    found = pipeline_of(open_family(folder)).generate(REQUESTS, SamplingConfig.from_mapping(fields))
    return torch.stack([image.pixels for image in found])


def test_a_cascade_generates_what_its_stages_do_one_after_the_other(folder: Path, runs: list[str]) -> None:
    base, large = (open_family(Path(run)) for run in runs)
    assert isinstance(base, Family)
    assert isinstance(large, Family)
    first, second = (SamplingConfig.from_mapping(one["sampling"]) for one in SETTINGS)
    small = [image.pixels for image in Pipeline(base).generate(REQUESTS, first)]
    expected = torch.stack([image.pixels for image in upscale(Upscaling(large, second, 5), small, REQUESTS)])
    assert generated(folder).shape == (2, 3, 32, 32)
    assert torch.equal(generated(folder), expected)
    assert torch.equal(generated(folder, width=32, height=32), expected)
    assert generated(folder, width=48, height=32).shape == (2, 3, 32, 48)


def test_its_stages_open_in_diffusers(folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    assert set(outline_family(folder)) == {f"{s}/{n}" for s in ("base", "enlarge-1") for n in ("unet", "text_encoder")}
    for name, kind in (("base", "IFPipeline"), ("enlarge-1", "IFSuperResolutionPipeline")):
        assert type(diffusers.DiffusionPipeline.from_pretrained(folder / name)).__name__ == kind


def test_saving_and_opening_changes_no_picture(folder: Path, tmp_path: Path) -> None:
    family = open_family(folder)
    assert isinstance(family, Cascade)
    family.save(tmp_path / "again")
    assert torch.equal(generated(tmp_path / "again"), generated(folder))
    assert open_family(tmp_path / "again").weights_sha256 == family.weights_sha256
    assert set(family.weights_sha256) == {
        f"{stage}.{name}" for stage in ("base", "enlarge-1") for name in ("unet", "text_encoder")
    }


def test_a_picture_says_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    mapping = {"command": "sample", "model": str(folder), "prompts": ["a star"], "sampling": {"images_per_prompt": 1}}
    recipe = SampleRecipe.from_mapping(mapping)
    found = sample.run(recipe, RunOptions(out=tmp_path / "out", device="cpu"), SilentReporter())
    (picture,) = (tmp_path / "out").glob("*-0*.png")
    assert found["generated"] == 1
    provenance = read_provenance(picture)
    assert provenance["stages"]["enlarge-1"]["noise_level"] == 5
    assert "enlarge-1.unet" in provenance["weights"]
    again = SampleRecipe.from_mapping(recipe_of_picture(provenance) | {"model": str(folder)})
    options = RunOptions(out=tmp_path / "again", device="cpu")
    sample.run(again, options, SilentReporter(), repeated=provenance)
    (repeated,) = (tmp_path / "again").glob("*-0*.png")
    assert torch.equal(read_image(repeated), read_image(picture))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"noise_level": 5', '"noise_level": 6'))
    with pytest.raises(CheckpointError, match="the model's stages have changed since"):
        sample.run(again, replace(options, out=tmp_path / "third"), SilentReporter(), repeated=provenance)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 7}, "sampling.steps has no meaning for this model: each stage of a cascade has its own"),
        ({"guidance": {"scale": 3.0}}, "sampling.guidance.scale has no meaning"),
        ({"width": 33}, "width 33 is not possible: not a multiple of 2; take 32"),
    ],
)
def test_settings_that_belong_to_a_stage_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generated(folder, **fields)


def test_models_that_do_not_fit_their_place_are_refused(runs: list[str], folder: Path, tmp_path: Path) -> None:
    message = rf"'{runs[1]}/model' cannot be the stage 'base' of a cascade: it does not generate pictures from nothing"
    with pytest.raises(CheckpointError, match=message):
        cascade.run(recipe_of(runs[::-1], SETTINGS[::-1]), tmp_path / "other", SilentReporter())
    assert [path.name for path in tmp_path.iterdir()] == ["cascade"], "nothing half done is left"
    with pytest.raises(OutputError, match="exists"):
        cascade.run(recipe_of(runs, SETTINGS), folder, SilentReporter())
    unknown = [{"sampling": {"steps": 2, "timesteps": [5000, 0]}}, SETTINGS[1]]
    with pytest.raises(UsageError, match="stage 'base': "):
        cascade.run(recipe_of(runs, unknown), tmp_path / "other", SilentReporter())
    too_much = "stage 'enlarge-1': noise_level=31 is not possible: the model knows levels up to 30"
    with pytest.raises(UsageError, match=too_much):
        cascade.run(
            recipe_of(runs, [SETTINGS[0], SETTINGS[1] | {"noise_level": 31}]), tmp_path / "other", SilentReporter()
        )
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"noise_level": 5', '"noise_level": 31'))
    with pytest.raises(UsageError, match=too_much):
        generated(folder)
    index.write_text(index.read_text().replace("noise_level", "noise_levl"))
    with pytest.raises(CheckpointError, match=r"stages\.enlarge-1: .*noise_levl"):
        generated(folder)
