"""`train-unet` without an autoencoder: on pixels, with text, with class labels, with both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.errors import DataError, RecipeError, UsageError
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.label_encoder import LabelEncoder
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.families.pixel_diffusion import PixelDiffusion
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.recipe.schema import EvalRecipe, TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import ImageRequest, requests_for
from ldm_cli.stages import evaluate
from ldm_cli.stages.support.batch_encoder import cache_key
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.stages.train_unet import parameters

from .tiny import assert_resumes, save_random_clip, trained, unet_recipe
from .tiny_sd3 import WIDTH, save_tiny_sd3

CLASSES = ["circle", "square", "triangle", "star", "cross", "ring"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 plain pictures of 16 px in a tar with `cls` members: the class is the brightness."""
    import io
    import tarfile

    from PIL import Image

    folder = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 40), ("val", 12)):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for i in range(count):
                label = i % len(CLASSES)
                picture = io.BytesIO()
                Image.new("RGB", (16, 16), (40 * label, 40 * label, 255 - 40 * label)).save(picture, "PNG")
                text = f"a {CLASSES[label]}".encode()
                for name, content in (("png", picture.getvalue()), ("cls", b"%d" % label), ("txt", text)):
                    info = tarfile.TarInfo(f"{i:04d}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def pixel_recipe(scenes: Path, clip: Path, **given: Any) -> dict[str, Any]:
    recipe = unet_recipe(scenes, clip, Path("pixels"), **given)
    return recipe | {"unet": recipe["unet"] | {"out_channels": 6}}


def class_recipe(labelled: Path, clip: Path | None = None, **train: Any) -> dict[str, Any]:
    recipe = pixel_recipe(labelled, clip or Path(), data={"image_size": 16, "label": "cls"}, **train)
    unet = recipe["unet"] | {"num_class_embeds": len(CLASSES) + 1}
    if clip is None:
        unet |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        unet |= {"mid_block_type": "UNetMidBlock2D"}
    return recipe | {"unet": unet, "classes": CLASSES, "text_encoder": "" if clip is None else str(clip)}


def pictures(family: PixelDiffusion, prompts: list[str], noise: Tensor, **fields: Any) -> Tensor:
    config = SamplingConfig.from_mapping({"steps": 4, "width": noise.shape[3], "height": noise.shape[2], **fields})
    found = Pipeline(family).generate([ImageRequest(prompt, 0) for prompt in prompts], config, noise)
    return torch.stack([image.pixels for image in found])


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The initial noise of diffusers' pipelines of pixels, whose steps add the noise of ours."""
    diffusers = pytest.importorskip("diffusers")
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    steps = torch.randn(8, 2, 3, 16, 16, generator=torch.Generator().manual_seed(8))
    calls = iter(steps)
    monkeypatch.setattr(diffusers.pipelines.deepfloyd_if.pipeline_if, "randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, **__: next(calls))
    ours = "ldm_cli.sampling.latent_sampler.step_noise"
    monkeypatch.setattr(ours, lambda requests, shape, device: lambda i: steps[i, : len(requests)])
    return noise


def their_pictures(folder: Path, prompts: list[str], **given: Any) -> Tensor:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.IFPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_inference_steps": 4, "clean_caption": False}
    found = pipeline(prompts, **size, output_type="np", **given).images
    return (torch.from_numpy(found).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def long_clip(clip_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with 77 positions, as many tokens as IFPipeline always gives."""
    from ldm_cli.data.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("clip") / "clip"
    tokenizer = Tokenizer.load(clip_run / "model")
    tokenizer.model_max_length = 77
    save_random_clip(folder, tokenizer, max_position_embeddings=77)
    return folder


@pytest.mark.parametrize("kind", ["clip", "t5"])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_the_folder_of_a_run_gives_the_pictures_of_diffusers(
    scenes: Path, long_clip: Path, tmp_path: Path, same_noise: Tensor, kind: str, guidance: float
) -> None:
    clip = long_clip if kind == "clip" else Path(save_tiny_sd3(tmp_path / "parts")["text_encoder_3"])
    recipe = pixel_recipe(scenes, clip, data={"image_size": 16}, diffusion={"beta_schedule": "squaredcos_cap_v2"})
    if kind == "t5":
        recipe["unet"]["cross_attention_dim"] = WIDTH
    recipe["train"] |= {"steps": 3, "lr": 3e-2}
    trained(recipe, tmp_path / "run")
    prompts = ["a Red circle", "a small blue square at the top"]
    family = open_family(tmp_path / "run")
    assert isinstance(family, PixelDiffusion)
    assert set(outline_family(tmp_path / "run/model")) == {"unet", "text_encoder"}
    ours = pictures(family, prompts, same_noise, guidance=guidance)
    theirs = their_pictures(tmp_path / "run/model", prompts, guidance_scale=guidance)
    assert theirs.float().std() > 10, "flat pictures prove nothing"
    assert (ours.int() - theirs.int()).abs().max() <= 2


def test_a_killed_run_on_pixels_with_classes_and_text_resumes_exactly(
    labelled: Path, clip_run: Path, tmp_path: Path
) -> None:
    recipe = class_recipe(labelled, clip_run / "model", steps=8, save_every=4, ema_decay=0.9)
    assert_resumes(recipe, tmp_path, 4)


def test_classes_are_learnt_and_asked_for_by_name_or_number(labelled: Path, tmp_path: Path) -> None:
    recipe = class_recipe(labelled, steps=100, lr=5e-3, ema_decay=0.9, log_every=50, batch_size=12)
    recipe["data"]["image_size"] = 8
    trained(recipe | {"diffusion": {"prediction_type": "sample"}}, tmp_path)
    assert not (tmp_path / "model/text_encoder").exists()
    family = open_family(tmp_path)
    assert isinstance(family, PixelDiffusion)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).expand(3, -1, -1, -1)
    red = pictures(family, ["circle", "3", "ring"], noise, steps=10, guidance=1.0)[:, 0].float().mean(dim=(1, 2))
    assert (red - torch.tensor([0.0, 120.0, 200.0])).abs().max() < 40
    with pytest.raises(UsageError, match="no class 'hexagon': its classes are circle, square"):
        pictures(family, ["hexagon"], noise[:1])
    config = SamplingConfig(images_per_prompt=1)
    with pytest.raises(UsageError, match="no class 'hexagon'"):  # before a folder is claimed
        pipeline_of(family).check(requests_for(["circle", "hexagon"], config), config)
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["id2label"]["5"] == "ring"


def test_eval_asks_a_model_of_classes_for_the_classes_of_the_data(
    labelled: Path, clip_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(class_recipe(labelled, steps=1), tmp_path)
    asked: set[str] = set()
    index_of = LabelEncoder._index

    def noted(self: LabelEncoder, name: str) -> int:
        asked.add(name)
        return index_of(self, name)

    monkeypatch.setattr(LabelEncoder, "_index", noted)
    data = {"shards": str(labelled / "val-*.tar"), "image_size": 16, "caption": "cls"}
    config: dict[str, Any] = {"pipeline": str(tmp_path / "model"), "clip": str(clip_run / "model")}
    config |= {"metrics": ["clip_score"], "num_generated": 6, "sampling": {"steps": 2, "images_per_prompt": 1}}
    recipe = EvalRecipe.from_mapping({"command": "eval", "data": data, "eval": config})
    evaluate.run(recipe, RunOptions(device="cpu"), SilentReporter())
    assert asked == {"", "0", "1", "2", "3", "4", "5"}


def test_a_folder_with_classes_gives_the_pictures_of_diffusers(
    labelled: Path, tmp_path: Path, same_noise: Tensor
) -> None:
    diffusers = pytest.importorskip("diffusers")
    trained(class_recipe(labelled, steps=40, lr=1e-2), tmp_path)
    family = open_family(tmp_path)
    assert isinstance(family, PixelDiffusion)
    ours = pictures(family, ["square", "star"], same_noise, guidance=3.0)
    pipeline = diffusers.IFPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    forward, labels = pipeline.unet.forward, torch.tensor([6, 6, 1, 3])
    pipeline.unet.forward = lambda *args, **given: forward(*args, **given | {"class_labels": labels})
    nothing = torch.zeros(2, 1, 1)
    given = {"prompt_embeds": nothing, "negative_prompt_embeds": nothing, "height": 16, "width": 16}
    images = pipeline(**given, num_inference_steps=4, guidance_scale=3.0, output_type="np").images
    theirs = (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round()
    assert theirs.std() > 10, "flat pictures prove nothing"
    assert (ours.int() - theirs.int()).abs().max() <= 2


def test_a_prompt_names_a_class_beside_its_text(clip_run: Path) -> None:
    text = CLIPTextEncoder.load(clip_run / "model", is_for_pixels=True)
    encoder = LabelEncoder(tuple(CLASSES), text, "cpu")
    reading = PromptReading()
    prompts = ["<star> a red one", "< 2 >a red one", "a red one", ""]
    found = encoder.encode_prompts(prompts, reading, num_chunks=1, warn=print)
    assert found.pooled is not None
    assert found.tokens is not None
    assert found.pooled.tolist() == [3, 2, 6, 6]
    expected = text.encode_prompts(["a red one", "a red one", "a red one", ""], reading, num_chunks=1, warn=print)
    assert expected.tokens is not None
    assert torch.equal(found.tokens, expected.tokens)


def test_captions_are_no_class_until_the_labels_of_a_batch_say_so() -> None:
    encoder = LabelEncoder(tuple(CLASSES), None, "cpu")
    assert encoder.encode_tokens(encoder.tokens(["", ""])).pooled.tolist() == [6, 6]  # type: ignore[union-attr]
    labels = torch.tensor([5, 0])
    assert encoder.encode_tokens(encoder.labelled(encoder.tokens(["", ""]), labels)).pooled is not None
    with pytest.raises(DataError, match="samples have no class labels"):
        encoder.labelled({}, None)
    with pytest.raises(DataError, match="class label 6 is unknown: there are names for 6 classes"):
        encoder.labelled({}, torch.tensor([2, 6]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": "cache"}, "vae=pixels does not go with cache"),
        ({"image_embedding": {"image_encoder": "clip"}}, "vae=pixels does not go with image_embedding"),
        ({"classes": CLASSES}, "classes needs data.label"),
        ({"vae": "runs/vae", "classes": CLASSES}, "classes needs vae=pixels"),
        ({"classes": ["cat", "cat"]}, "classes names one class twice"),
        ({"diffusion": {"prediction_type": "flow_prediction"}}, "needs another diffusion.prediction_type"),
    ],
)
def test_a_recipe_that_pixels_contradict_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainUnetRecipe.from_mapping(pixel_recipe(Path(), Path("clip")) | change)


def test_a_unet_that_does_not_fit_pixels_is_named(scenes: Path, clip_run: Path) -> None:
    recipe = unet_recipe(scenes, clip_run / "model", Path("pixels"))
    with pytest.raises(RecipeError, match=r"unet.out_channels=3, expected 6"):
        parameters(TrainUnetRecipe.from_mapping(recipe), [])
    with pytest.raises(RecipeError, match="leaves nothing to cache"):
        cache_key(TrainUnetRecipe.from_mapping(recipe))
