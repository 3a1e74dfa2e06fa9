"""unCLIP's decoder by `train-unet`, joined to a prior, and what `ldm sample` makes of the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.core.diffusion.betas import alphas_cumprod
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.process import process_of
from ldm_cli.core.models.image_normalizer import ImageNormalizer
from ldm_cli.core.models.layers import timestep_embedding
from ldm_cli.errors import CheckpointError, DataError, RecipeError, UsageError
from ldm_cli.families.open_family import open_family
from ldm_cli.families.unclip import UnCLIP, our_noising
from ldm_cli.pictures.provenance import recipe_of, repeatable_provenance
from ldm_cli.recipe.cascade_recipe import CascadeRecipe
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import cascade, convert, sample
from ldm_cli.stages.convert import ConvertOptions
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.storage import file_sha256

from ..faults.runs import metrics
from .tiny import cached, clip_recipe, decoder_recipe, lose_after, losses, prior_recipe, trained

WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"
TRAIN = {"lr": 5e-3, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def decoder(scenes: Path, clip_run: Path, vae_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decoder") / "run"
    trained(decoder_recipe(scenes, clip_run / "model", vae_run / "model", **TRAIN), out)
    return out


@pytest.fixture(scope="module")
def whole(decoder: Path, scenes: Path, clip_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder, joined to a prior."""
    folder = tmp_path_factory.mktemp("whole")
    trained(prior_recipe(scenes, clip_run / "model", steps=4), folder / "prior")
    convert.run(decoder, folder / "unclip", ConvertOptions(prior=folder / "prior"), SilentReporter())
    return folder / "unclip"


@pytest.fixture(scope="module")
def pictures(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two pictures, of the training's samples."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    grid = Image.open(next((decoder / "samples").glob("*/grid.png")))
    names = []
    for number in range(2):
        names.append(str(folder / f"{number}.png"))
        grid.crop((32 * number, 0, 32 * number + 32, 32)).save(names[-1])
    return names


def sampled(model: Path, out: Path, repeated: Any = None, **fields: Any) -> list[Path]:
    settings = {"steps": 3, "images_per_prompt": 1, "prior": {"steps": 3}} | fields.pop("sampling", {})
    recipe = {"command": "sample", "model": str(model), "prompts": ("a red circle",), "sampling": settings} | fields
    result = sample.run(SampleRecipe.from_mapping(recipe), RunOptions(out=out), SilentReporter(), repeated=repeated)
    return [Path(image["file"]) for image in result["images"]]


def pixels(files: list[Path]) -> list[bytes]:
    from PIL import Image

    return [Image.open(file).convert("RGB").tobytes() for file in files]


def test_embeddings_are_noised_as_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings, noise = torch.randn(2, 3, 6, generator=generator)
    normalizer = ImageNormalizer.measured(2 + 3 * torch.randn(500, 6, generator=generator))
    config = DiffusionConfig.from_mapping(our_noising().settings.diffusion)
    found = normalizer.augmented(embeddings, torch.tensor([0.0, 0.25, 0.9999]), noise, process_of(config))
    shares = alphas_cumprod(config)[[0, 250, 999]].float()[:, None]
    z = (embeddings - normalizer.mean) / normalizer.std
    expected = (shares.sqrt() * z + (1 - shares).sqrt() * noise) * normalizer.std + normalizer.mean
    torch.testing.assert_close(found[:, :6], expected)
    waves = timestep_embedding(torch.tensor([0, 250, 999]), 6, flip_sin_to_cos=True, freq_shift=0)
    torch.testing.assert_close(found[:, 6:], waves)


def test_a_dead_dimension_has_deviation_1() -> None:
    assert ImageNormalizer.measured(torch.ones(5, 2)).std.tolist() == [[1.0, 1.0]]


def test_the_decoder_learns_and_shows_variations_of_held_out_pictures(decoder: Path) -> None:
    assert losses(decoder)[-1] < losses(decoder)[0]
    assert len(json.loads(next((decoder / "samples").glob("*/prompts.json")).read_text())) == 2
    family = open_family(decoder)
    assert isinstance(family, UnCLIP)
    assert family.prior is None
    assert not torch.equal(family.normalizer.std, torch.ones(1, 16))


def test_training_begins_at_a_trained_decoder_and_keeps_its_statistics(
    decoder: Path, scenes: Path, tmp_path: Path
) -> None:
    recipe = decoder_recipe(scenes, Path("x"), Path("y"), data={"shards": str(scenes / "val-*.tar")}, steps=1, lr=1e-9)
    for name in ("unet", "vae", "text_encoder", "image_embedding"):
        del recipe[name]
    trained(recipe | {"start_from": str(decoder)}, tmp_path / "run")
    before, after = open_family(decoder / "model"), open_family(tmp_path / "run/model")
    assert isinstance(before, UnCLIP)
    assert isinstance(after, UnCLIP)
    assert torch.equal(after.normalizer.std, before.normalizer.std)
    for ours, theirs in zip(after.denoiser.parameters(), before.denoiser.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_decoder_resumes_in_the_same_bits(
    decoder: Path, scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    recipe = decoder_recipe(scenes, clip_run / "model", vae_run / "model", **TRAIN)
    lose_after(5, recipe, tmp_path / "run")
    trained(recipe, tmp_path / "run")
    assert file_sha256(tmp_path / "run" / WEIGHTS) == file_sha256(decoder / WEIGHTS)


def test_a_cache_with_embeddings_changes_nothing_and_is_stale_when_the_clip_changes(
    decoder: Path, scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    recipe = decoder_recipe(scenes, clip_run / "model", vae_run / "model", **TRAIN)
    recipe = cached(recipe, tmp_path / "cache")
    trained(recipe, tmp_path / "run")
    assert file_sha256(tmp_path / "run" / WEIGHTS) == file_sha256(decoder / WEIGHTS)
    trained(clip_recipe(scenes, steps=1) | {"seed": 9}, tmp_path / "other")
    recipe["image_embedding"] = {"image_encoder": str(tmp_path / "other/model")}
    with pytest.raises(DataError, match=r"stale: image_encoder was .* and is "):
        trained(recipe, tmp_path / "another run")


def test_dropped_embeddings_are_zeros_whatever_the_picture_is(
    scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    """With all of them dropped, another image encoder makes no other training loss."""
    trained(clip_recipe(scenes, steps=1) | {"seed": 9}, tmp_path / "other")
    found = []
    for name, encoder in (("one", clip_run / "model"), ("two", tmp_path / "other/model")):
        train = {"steps": 3, "lr": 1e-2, "log_every": 1, "validation_samples": 12}
        recipe = decoder_recipe(scenes, clip_run / "model", vae_run / "model", **train)
        recipe["image_embedding"] = {"image_encoder": str(encoder), "dropout": 1.0}
        trained(recipe, tmp_path / name)
        found.append(losses(tmp_path / name))
    assert found[0] == found[1]
    assert metrics(tmp_path / "one")[-1]["val_loss"] != metrics(tmp_path / "two")[-1]["val_loss"]


def test_a_unet_that_takes_no_embedding_is_refused(scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path) -> None:
    recipe = decoder_recipe(scenes, clip_run / "model", vae_run / "model")
    recipe["unet"] = recipe["unet"] | {"projection_class_embeddings_input_dim": 16}
    with pytest.raises(RecipeError, match=r"input_dim=16, but embedding and noise level have 32 numbers"):
        trained(recipe, tmp_path)


def test_a_whole_model_samples_prompts_and_repeats_a_picture(whole: Path, tmp_path: Path) -> None:
    files = sampled(whole, tmp_path / "one", prompts=("a red circle", "a blue square"))
    assert len({*pixels(files)}) == 2
    provenance = repeatable_provenance(files[1])
    assert provenance["sampling"]["prior"] == {"steps": 3, "scale": 4.0, "noise_level": 0}
    assert {"prior", "prior_text_encoder", "image_normalizer"} <= provenance["weights"].keys()
    again = SampleRecipe.from_mapping(recipe_of(provenance))
    sample.run(again, RunOptions(out=tmp_path / "two"), SilentReporter(), repeated=provenance)
    assert pixels(sorted((tmp_path / "two").glob("0*.png"))) == pixels(files[1:])


@pytest.mark.parametrize(
    "edit", [{}, {"from_text": "a red circle", "to_text": "a blue circle", "amount": 0.3}], ids=["plain", "moved"]
)
def test_variations_of_a_picture_are_repeated(
    whole: Path, pictures: list[str], tmp_path: Path, edit: dict[str, Any]
) -> None:
    fields = {"prompts": ("",), "edit": {"embedded": pictures[:1]} | edit, "sampling": {"images_per_prompt": 2}}
    files = sampled(whole, tmp_path / "one", **fields)
    assert len({*pixels(files)}) == 2
    provenance = repeatable_provenance(files[1])
    assert provenance["sources"]["picture 1"] == pictures[0]
    assert provenance["edit"]["embedded_sha256"] == [file_sha256(Path(pictures[0]))]
    again = SampleRecipe.from_mapping(recipe_of(provenance))
    sample.run(again, RunOptions(out=tmp_path / "two"), SilentReporter(), repeated=provenance)
    assert pixels(sorted((tmp_path / "two").glob("0*.png"))) == pixels(files[1:])


def test_two_pictures_make_a_strip_whose_pictures_are_repeated(
    whole: Path, pictures: list[str], tmp_path: Path
) -> None:
    edit = {"embedded": pictures}
    files = sampled(whole, tmp_path / "strip", edit=edit, interpolate=4)
    assert len(files) == 5
    assert list((tmp_path / "strip").glob("walk-*.webp"))
    ends = [sampled(whole, tmp_path / Path(name).stem, edit={"embedded": [name]})[0] for name in pictures]
    assert pixels(ends) == pixels([files[0], files[-1]])
    provenance = repeatable_provenance(files[2])
    again = SampleRecipe.from_mapping(recipe_of(provenance))
    sample.run(again, RunOptions(out=tmp_path / "two"), SilentReporter(), repeated=provenance)
    assert pixels(sorted((tmp_path / "two").glob("0*.png"))) == pixels(files[2:3])


def test_pictures_need_a_model_that_embeds_them(unet_run: Path, pictures: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only unCLIP models do"):
        sampled(unet_run, tmp_path, edit={"embedded": pictures[:1]}, sampling={"prior": {}})
    with pytest.raises(UsageError, match=r"sampling.prior has no meaning for this model"):
        sampled(unet_run, tmp_path)


def test_it_is_no_stage_of_a_cascade(whole: Path, tmp_path: Path) -> None:
    stages = [{"model": str(whole)}, {"model": str(whole)}]
    recipe = CascadeRecipe.from_mapping({"command": "cascade", "name": "tiny", "stages": stages})
    with pytest.raises(CheckpointError, match="cannot be the stage 'base' of a cascade: it is of unCLIP"):
        cascade.run(recipe, tmp_path / "cascade", SilentReporter())


def test_a_prior_of_another_clip_is_not_joined(decoder: Path, scenes: Path, tmp_path: Path) -> None:
    trained(clip_recipe(scenes, steps=1) | {"seed": 9}, tmp_path / "clip")
    trained(prior_recipe(scenes, tmp_path / "clip/model", steps=1), tmp_path / "prior")
    with pytest.raises(CheckpointError, match="their image encoders differ"):
        convert.run(decoder, tmp_path / "out", ConvertOptions(prior=tmp_path / "prior"), SilentReporter())
    assert not (tmp_path / "out").exists()


def test_a_model_without_image_embeddings_takes_no_prior(unet_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is no decoder of image embeddings"):
        convert.run(unet_run, tmp_path / "out", ConvertOptions(prior=unet_run), SilentReporter())


def test_what_is_no_prior_is_not_joined(decoder: Path, whole: Path, clip_run: Path, tmp_path: Path) -> None:
    for other, cause in (
        (decoder, "it holds a StableUnCLIPImg2ImgPipeline"),
        (whole, "it holds a StableUnCLIPPipeline"),
        (clip_run, "it has no model_index.json"),
    ):
        with pytest.raises(UsageError, match=f"is no prior: {cause}; give a run of train-prior"):
            convert.run(decoder, tmp_path / "out", ConvertOptions(prior=other), SilentReporter())


def test_a_whole_model_is_converted_with_all_of_its_parts(whole: Path, tmp_path: Path) -> None:
    result = convert.run(whole, tmp_path / "half", ConvertOptions(dtype="fp16"), SilentReporter())
    assert "left_out" not in result
    assert {p.name for p in (tmp_path / "half").iterdir()} == {p.name for p in whole.iterdir()}
    assert isinstance(open_family(tmp_path / "half"), UnCLIP)
