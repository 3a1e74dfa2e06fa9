"""`ldm sample --upscale`: after a generator, and of a photo; what is recorded, repeated and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.core.codec import PixelCodec
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.errors import CheckpointError, UsageError
from ldm_cli.families.low_resolution import LowResolution
from ldm_cli.families.pixel_diffusion import pixel_settings
from ldm_cli.families.pixel_upscale import NOISING_BETAS, PixelUpscale
from ldm_cli.formats.png_metadata import read_provenance
from ldm_cli.pictures.images import read_image, save_image
from ldm_cli.pictures.provenance import recipe_of, repeatable_provenance
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.dry_run import dry_run
from ldm_cli.stages.sample import run
from ldm_cli.stages.support.options import RunOptions
from tests.sampling.tiny import UNET, randomize, tiny_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A generator of 16 px, and an upscaler of pixels by two."""
    folder, generator = tmp_path_factory.mktemp("models"), tiny_pipeline().family
    generator.save(folder / "generator")
    fields = {"in_channels": 6, "out_channels": 6, "class_embed_type": "timestep", "sample_size": 32}
    unet = randomize(UNet2DConditionModel(UNet2DConditionConfig(**UNET | fields)), 1)
    settings = pixel_settings(DiffusionConfig(prediction_type="sample").to_mapping())
    low = LowResolution(2, 2, 300, 20, NOISING_BETAS)
    PixelUpscale(unet, PixelCodec(), generator.encoder, settings, low_resolution=low).save(folder / "upscaler")
    return {"generator": folder / "generator", "upscaler": folder / "upscaler"}


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 × 45 pixels."""
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    generator = torch.Generator().manual_seed(0)
    save_image(file, torch.randint(0, 256, (3, 19, 45), dtype=torch.uint8, generator=generator))
    return file


def made(out: Path, repeated: Any = None, **fields: Any) -> Path:
    """The first picture of a job."""
    recipe = {"command": "sample", "prompts": ["a red circle"], **fields}
    recipe["sampling"] = {"steps": 2, "images_per_prompt": 1} | recipe.get("sampling", {})
    result = run(SampleRecipe.from_mapping(recipe), RunOptions(out, "cpu"), SilentReporter(), None, repeated)
    return Path(result["images"][0]["file"])


def repeat(picture: Path, out: Path, **changes: Any) -> Tensor:
    """As `ldm sample --repeat picture`."""
    record = repeatable_provenance(picture)
    loaded = load_recipe(None, (), "sample", [(k, k, v) for k, v in changes.items()], base=recipe_of(record))
    result = run(loaded.recipe, RunOptions(out, "cpu"), SilentReporter(), None, record)  # type: ignore[arg-type]
    return read_image(Path(result["images"][0]["file"]))


def test_a_generated_picture_is_enlarged_and_repeated(models: dict[str, Path], tmp_path: Path) -> None:
    upscale = {"model": str(models["upscaler"]), "noise_level": 30, "sampling": {"steps": 3, "guidance": 2.0}}
    small = read_image(made(tmp_path / "small", model=str(models["generator"])))
    picture = made(tmp_path / "a", model=str(models["generator"]), upscale=upscale)
    large = read_image(picture)
    assert (small.shape, large.shape) == ((3, 16, 16), (3, 32, 32))
    found = read_provenance(picture)
    assert found["upscale"]["noise_level"] == 30
    assert found["upscale"]["sampling"]["steps"] == 3
    assert found["sources"] == {"model": "generator", "upscaler": "upscaler"}
    assert torch.equal(repeat(picture, tmp_path / "b"), large)
    again = repeat(picture, tmp_path / "c", **{"upscale.noise_level": 31})
    assert not torch.equal(again, large)
    listing = json.loads((tmp_path / "a/images.json").read_text())
    assert set(listing["job"]["upscale"]["weights"]) == {"unet", "text_encoder"}


def test_a_photo_of_any_size_is_enlarged_in_parts_and_repeated(
    models: dict[str, Path], photo: Path, tmp_path: Path
) -> None:
    fields = {"upscale": {"model": str(models["upscaler"])}, "edit": {"image": str(photo)}}
    picture = made(tmp_path / "a", **fields)
    assert read_image(picture).shape == (3, 38, 90)
    found = read_provenance(picture)
    assert found["upscale"] == {"noise_level": 20}
    assert found["sources"] == {"model": "upscaler", "image": "photo.png"}
    assert "strength" not in found["edit"]
    assert torch.equal(repeat(picture, tmp_path / "b"), read_image(picture))
    parts = made(tmp_path / "c", **fields, tile=48)
    assert not torch.equal(read_image(parts), read_image(picture))
    assert torch.equal(repeat(parts, tmp_path / "d"), read_image(parts))
    alone = made(tmp_path / "e", model=str(models["upscaler"]), edit={"image": str(photo)})
    assert torch.equal(read_image(alone), read_image(picture))


def test_another_upscaler_does_not_repeat_the_picture(models: dict[str, Path], photo: Path, tmp_path: Path) -> None:
    picture = made(tmp_path / "a", model=str(models["generator"]), upscale={"model": str(models["upscaler"])})
    record = repeatable_provenance(picture)
    record["upscale"]["weights"]["unet"] = "0" * 64
    with pytest.raises(CheckpointError, match="the weights of the upscaler have changed"):
        made(tmp_path / "b", record, model=str(models["generator"]), upscale={"model": str(models["upscaler"])})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "upscaler"}, "this model enlarges pictures: none is given"),
        ({"model": "upscaler", "edit": {"image": "photo", "strength": 0.5}}, "edit.strength has no meaning"),
        ({"model": "generator", "upscale": {"model": "generator"}}, "enlarges no pictures"),
        ({"model": "generator", "upscale": {"model": "upscaler", "noise_level": 500}}, "noise_level=500"),
    ],
)
def test_what_cannot_be_enlarged_is_said(
    models: dict[str, Path], photo: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    text = json.dumps(fields).replace('"photo"', json.dumps(str(photo)))
    for name, folder in models.items():
        text = text.replace(f'"{name}"', json.dumps(str(folder)))
    with pytest.raises(UsageError, match=message):
        made(tmp_path / "out", **json.loads(text))
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_a_model_needs_a_photo(models: dict[str, Path], photo: Path) -> None:
    base: dict[str, Any] = {"command": "sample", "upscale": {"model": str(models["upscaler"])}}
    with pytest.raises(ValueError, match=r"edit.image is null"):
        SampleRecipe.from_mapping(base)
    with pytest.raises(ValueError, match="model is missing"):
        SampleRecipe.from_mapping({"command": "sample"})
    recipe = SampleRecipe.from_mapping(base | {"edit": {"image": str(photo)}, "prompts": [""]})
    found = dry_run(recipe, SilentReporter())
    assert set(found["parameters"]) == {"upscaler's unet", "upscaler's text_encoder"}


def test_an_upscaler_takes_no_image_prompt(models: dict[str, Path], photo: Path, tmp_path: Path) -> None:
    given = [{"image": str(photo), "adapter": "adapter.safetensors"}]
    with pytest.raises(UsageError, match="this model takes no image prompts: it enlarges pictures"):
        made(tmp_path / "a", model=str(models["upscaler"]), edit={"image": str(photo)}, image_prompts=given)
