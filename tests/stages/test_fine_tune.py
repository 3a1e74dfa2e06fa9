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
from ldm_cli.recipe.schema import SampleRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import sample
from ldm_cli.stages.support.options import RunOptions
from tests.data.tars import numbered_shards, png, write_tar
from tests.faults.runs import metrics

from .test_start_from import started
from .test_train_unet import make_task
from .tiny import trained, unet_recipe, vae_recipe


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
    recipe = started(whole, "unet", unet_run, vae="", text_encoder="")
    mixed = {"shards": [str(photos), str(class_pictures)], "weights": [1, 1], "loss_weights": [1, 0.5]}
    recipe["data"] |= mixed | {"val_shards": str(photos)}
    trained(recipe, tmp_path / "tuned")
    figures = metrics(tmp_path / "tuned")
    trained({**recipe, "train": {**recipe["train"], "steps": 1, "lr": 1e-9}}, tmp_path / "untouched")
    assert figures[-1]["val_loss"] < 0.9 * metrics(tmp_path / "untouched")[-1]["val_loss"]


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


@pytest.mark.parametrize("field", [{"loss_weights": [2]}, {"mask": "mask.png"}])
def test_a_loss_that_only_denoisers_have_is_refused_elsewhere(scenes: Path, field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"data.{next(iter(field))} has no meaning here"):
        TrainVaeRecipe.from_mapping(vae_recipe(scenes, data=field))
    recipe = unet_recipe(scenes, scenes, scenes)
    TrainUnetRecipe.from_mapping({**recipe, "data": {**recipe["data"], **field}})
