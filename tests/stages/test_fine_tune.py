"""A trained denoiser tuned on a few pictures: beside those of their class, and under masks."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from ldm_cli.data.pack import pack
from ldm_cli.errors import DataError, RecipeError
from ldm_cli.families.open_family import open_family
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.recipe.schema import TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import sample
from ldm_cli.stages.support.batch_encoder import BatchEncoder
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.stages.train_unet import parameters
from tests.data.tars import numbered_shards, png, write_tar
from tests.faults.runs import metrics

from .test_start_from import started
from .test_train_unet import make_task
from .tiny import cached, clip_recipe, trained, unet_recipe, vae_recipe


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Shards of forty pictures of one subject."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (40, 36), (200, 5 * number, 60)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("a sks circle")
    pack(folder, tmp_path / "packed-photos", SilentReporter())
    return tmp_path / "packed-photos"


@pytest.fixture
def class_pictures(unet_run: Path, tmp_path: Path) -> Path:
    """Shards of eight pictures that the model made of the class."""
    recipe = SampleRecipe.from_mapping(
        {
            "command": "sample",
            "model": str(unet_run),
            "prompts": ["a (red:1.2) circle", "a blue circle"],
            "sampling": {"steps": 2, "images_per_prompt": 4},
        }
    )
    sample.run(recipe, RunOptions(tmp_path / "class", "cpu"), SilentReporter())
    report = pack(tmp_path / "class", tmp_path / "packed-class", SilentReporter())
    assert report["samples"] == 8, "grid.png is no sample"
    assert (report["without_caption"], report["bad"]) == (0, {})
    return tmp_path / "packed-class"


def test_pictures_of_sample_are_packed_with_their_prompts_and_seeds(class_pictures: Path) -> None:
    import webdataset

    shard = str(class_pictures / "train-000000.tar")
    found = list(webdataset.WebDataset(shard, shardshuffle=False))
    assert [one["txt"].decode() for one in found] == ["a (red:1.2) circle"] * 4 + ["a blue circle"] * 4
    assert [json.loads(one["json"])["seed"] for one in found] == [0, 1, 2, 3] * 2


def test_a_denoiser_is_tuned_on_forty_pictures_beside_those_of_their_class(
    scenes: Path, clip_run: Path, vae_run: Path, unet_run: Path, photos: Path, class_pictures: Path, tmp_path: Path
) -> None:
    whole = unet_recipe(scenes, clip_run / "model", vae_run / "model", steps=30, lr=3e-3, save_every=30, log_every=15)
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(unet_run / "model", safety_checker=None)
    pipeline.save_pretrained(tmp_path / "diffusers")
    recipe = started(whole, "unet", tmp_path / "diffusers", vae="", text_encoder="")
    mixed = {"shards": [str(photos), str(class_pictures)], "weights": [1, 1], "loss_weights": [1, 0.5]}
    recipe["data"] |= mixed | {"val_shards": str(photos)}
    trained(recipe, tmp_path / "tuned")
    figures = metrics(tmp_path / "tuned")
    trained({**recipe, "train": {**recipe["train"], "steps": 1, "lr": 1e-9}}, tmp_path / "untouched")
    assert figures[-1]["val_loss"] < 0.9 * metrics(tmp_path / "untouched")[-1]["val_loss"]
    assert diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "tuned/model", safety_checker=None)


def test_the_loss_of_two_sources_is_half_of_dreambooths(
    scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    numbered_shards(tmp_path / "d", [40, 20])
    data: dict[str, Any] = {"shards": [str(tmp_path / f"d/00{n}.tar") for n in (0, 1)], "weights": [1, 1]}
    task, loader = make_task(
        (scenes, clip_run / "model", vae_run / "model"), tmp_path, data={**data, "loss_weights": [1, 0.3]}
    )
    batch = task.prepare(next(loader.batches(0, 1)))
    assert batch.loss_weights is not None
    is_prior = batch.loss_weights == 0.3
    assert 0 < is_prior.sum() < len(batch)
    plain = torch.stack([task.loss(replace(part, loss_weights=None), 1)[0] for part in batch.parts(len(batch))])
    expected = (plain[~is_prior].sum() + 0.3 * plain[is_prior].sum()) / len(batch)
    torch.testing.assert_close(task.loss(batch, 1)[0], expected)


def test_nothing_outside_a_mask_reaches_the_denoiser(
    scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    picture, mask = Image.new("L", (32, 32)), io.BytesIO()
    picture.paste(255, (0, 0, 32, 14))
    picture.save(mask, "PNG")
    sample = {"png": png((200, 90, 60), (32, 32)), "txt": b"a red circle", "mask.png": mask.getvalue()}
    write_tar(tmp_path / "d.tar", [(f"{n}.{kind}", data) for n in range(8) for kind, data in sample.items()])
    data = {"shards": f"{tmp_path}/d.tar", "mask": "mask.png"}
    task, loader = make_task((scenes, clip_run / "model", vae_run / "model"), tmp_path, data=data)
    gradients: list[torch.Tensor] = []

    def watch(denoiser: Any, arguments: Any, output: torch.Tensor) -> None:
        output.register_hook(gradients.append)  # type: ignore[no-untyped-call]

    task.family.denoiser.register_forward_hook(watch)
    task.loss(task.prepare(next(loader.batches(0, 1))), 1)[0].backward()  # type: ignore[no-untyped-call]
    (gradient,) = gradients
    assert gradient.shape[2:] == (16, 16)
    assert (gradient[:, :, 7:] == 0).all()
    assert (gradient[:, :, :7] != 0).all()


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_model_is_trained_with_another_layer_and_longer_captions_and_says_so(
    scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path, is_cached: bool
) -> None:
    clip = tmp_path / "clip"
    two_layers = clip_recipe(scenes, steps=1)
    two_layers["clip"]["text_config"]["num_hidden_layers"] = 2
    trained(two_layers, clip)
    recipe = unet_recipe(scenes, clip / "model", vae_run / "model", steps=1, log_every=1)
    fields = {"clip_skip": 2, "caption_chunks": 3}
    wanted = {**recipe, **fields}
    if is_cached:
        wanted = cached(wanted, tmp_path / "cache")
        with pytest.raises(DataError, match=r'clip_skip was "2" and is "None"; caption_chunks was "3" and is "1"'):
            trained({**recipe, "cache": wanted["cache"]}, tmp_path / "stale")
    trained(wanted, tmp_path / "run")
    encoder = BatchEncoder(TrainUnetRecipe.from_mapping(wanted), torch.device("cpu"), pytest.fail)
    tokens = encoder.condition(["a red circle"]).tokens
    assert tokens is not None
    assert tokens.shape == (1, 3 * 24, 16)
    reopened = open_family(tmp_path / "run/model").encoder
    for reading in (PromptReading(), PromptReading(clip_skip=2)):
        states = reopened.encode_prompts(["a red circle"], reading, num_chunks=3, warn=pytest.fail).tokens
        assert states is not None
        torch.testing.assert_close(states, tokens)
    last = reopened.encode_prompts([""], PromptReading(clip_skip=1), num_chunks=1, warn=pytest.fail).tokens
    assert not torch.equal(last, encoder.condition([""]).tokens[:, :24])  # type: ignore[index, arg-type]
    diffusers = pytest.importorskip("diffusers")
    assert diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "run/model", safety_checker=None)


def test_a_layer_that_the_text_encoder_has_not_is_refused(scenes: Path, clip_run: Path, vae_run: Path) -> None:
    recipe = {**unet_recipe(scenes, clip_run / "model", vae_run / "model"), "clip_skip": 2}
    with pytest.raises(RecipeError, match="clip_skip=2, but a text encoder has 1 layers"):
        parameters(TrainUnetRecipe.from_mapping(recipe), [])


@pytest.mark.parametrize("field", [{"loss_weights": [2]}, {"mask": "mask.png"}])
def test_a_loss_that_only_denoisers_have_is_refused_elsewhere(scenes: Path, field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"data.{next(iter(field))} has no meaning here"):
        TrainVaeRecipe.from_mapping(vae_recipe(scenes, data=field))
    recipe = unet_recipe(scenes, scenes, scenes)
    TrainUnetRecipe.from_mapping({**recipe, "data": {**recipe["data"], **field}})
