"""Values that are not finite: no picture and no number is made of them, and the message names where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_cli.errors import CheckpointError, DivergedError, RecipeError
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.sample import run
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.stages.support.picture_generator import Latents
from tests.sampling.test_guidance_models import tiny_clip_folder
from tests.sampling.tiny import tiny_pipeline

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_pipeline().family.save(tmp_path / "model")
    return tmp_path / "model"


def scale_tensor(folder: Path, part: str, name: str, factor: float) -> None:
    file = folder / part / f"{WEIGHTS[part]}.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * factor}, file)


def draw(model: Path, out: Path, latents: Latents | None = None, **fields: Any) -> list[str]:
    """The messages of a job of two prompts with two seeds each."""
    sampling = {"steps": 2, "images_per_prompt": 2, "guidance": 3.0, **fields.pop("sampling", {})}
    content = {"command": "sample", "model": str(model), "prompts": ["a red circle", "a blue square"], **fields}
    reporter = SilentReporter()
    run(SampleRecipe.from_mapping(content | {"sampling": sampling}), RunOptions(out, "cpu"), reporter, latents)
    return reporter.messages


@pytest.mark.parametrize(
    ("part", "name", "factor", "precision", "culprit"),
    [
        ("unet", "time_embedding.linear_2.weight", 1e38, "fp32", "first in the output of unet."),
        ("unet", "conv_out.bias", 1e6, "fp16", "the denoiser or its guidance overflows in fp16"),
        ("unet", "mid_block.attentions.0.proj_in.weight", 1e38, "bf16", "the denoiser or its guidance gives values"),
        ("vae", "decoder.conv_out.weight", 3e38, "fp32", "finite, first in the output of vae.decoder.conv_out"),
        ("vae", "post_quant_conv.weight", 1e38, "fp32", "the autoencoder gives values"),
        ("text_encoder", "text_model.final_layer_norm.weight", 1e6, "fp16", "the text encoder overflows in fp16"),
        ("text_encoder", "text_model.embeddings.token_embedding.weight", 3e38, "fp32", "the text encoder gives values"),
    ],
)
def test_pictures_that_overflow_are_named_with_their_cause_and_not_written(
    part: str, name: str, factor: float, precision: str, culprit: str, model: Path, tmp_path: Path
) -> None:
    scale_tensor(model, part, name, factor)
    with pytest.raises(DivergedError, match="4 of 4 pictures are not finite") as caught:
        draw(model, tmp_path / "out", sampling={"precision": precision})
    assert caught.value.code == 80
    assert culprit in str(caught.value)
    assert ("bf16 or fp32" in str(caught.value)) == (precision == "fp16")
    for prompt in ("a red circle", "a blue square"):
        for seed in (0, 1):
            assert f"'{prompt}' with seed {seed} is not finite" in str(caught.value)
    assert not list((tmp_path / "out").glob("*.png"))


def test_the_other_pictures_of_the_job_are_written_and_a_second_run_tries_the_missing_ones(
    model: Path, tmp_path: Path
) -> None:
    noise = torch.randn(4, 4, 8, 8)
    noise[2] = 3e38
    save_file({"latents": noise}, tmp_path / "noise.safetensors")
    for _ in range(2):
        with pytest.raises(DivergedError, match="'a blue square' with seed 0 is not finite"):
            draw(model, tmp_path / "out", Latents(tmp_path / "noise.safetensors"))
        names = sorted(path.name for path in (tmp_path / "out").glob("0*.png"))
        assert [name[:5] for name in names] == ["00000", "00001", "00003"]
        assert (tmp_path / "out" / "grid.png").is_file()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_given_latents_that_are_not_finite_are_refused(bad: float, model: Path, tmp_path: Path) -> None:
    noise = torch.zeros(4, 4, 8, 8)
    noise[2, 1, 3, 4] = bad
    save_file({"latents": noise}, tmp_path / "noise.safetensors")
    with pytest.raises(CheckpointError, match="some values are not finite"):
        draw(model, tmp_path / "out", Latents(tmp_path / "noise.safetensors"))


def test_a_walk_with_a_missing_frame_has_no_animation(model: Path, tmp_path: Path) -> None:
    scale_tensor(model, "vae", "decoder.conv_out.weight", 3e38)
    with pytest.raises(DivergedError, match="3 of 3"):
        draw(model, tmp_path / "out", interpolate=2, sampling={"images_per_prompt": 1})
    assert not list((tmp_path / "out").glob("*.webp"))


@pytest.mark.parametrize("guide", ["model", "clip"])
def test_a_guiding_model_that_overflows_is_noticed(guide: str, model: Path, tmp_path: Path) -> None:
    if guide == "model":
        tiny_pipeline().family.save(tmp_path / "weak")
        scale_tensor(tmp_path / "weak", "unet", "conv_out.weight", 3e38)
        guidance: dict[str, Any] = {"scale": 2.0, "model": str(tmp_path / "weak")}
    else:
        folder = tiny_clip_folder(tmp_path / "clip")
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = "vision_model.embeddings.patch_embedding.weight"
        save_file(tensors | {name: tensors[name] * 3e38}, file)
        guidance = {"scale": 2.0, "clip": {"model": str(folder), "scale": 10.0}}
    with pytest.raises(DivergedError, match="the denoiser or its guidance gives values that are not finite"):
        draw(model, tmp_path / "out", sampling={"guidance": guidance})


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN"])
@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor"])
def test_an_infinite_factor_of_an_autoencoder_is_refused_by_name(
    name: str, value: str, model: Path, tmp_path: Path
) -> None:
    file = model / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: float(value.lower())}))
    with pytest.raises(CheckpointError, match=name):
        draw(model, tmp_path / "out")


@pytest.mark.parametrize("value", ["1e999", "-1e999", ".nan"])
@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("sample", "sampling.guidance"),
        ("sample", "sampling.guidance.perturb.scale"),
        ("sample", "sampling.eta"),
        ("sample", "sampling.guidance.threshold.limit"),
        ("sample", "edit.strength"),
        ("train-unet", "train.lr"),
        ("train-unet", "diffusion.snr_gamma"),
        ("train-unet", "unet.norm_eps"),
        ("train-unet", "train.max_grad_norm"),
    ],
)
def test_no_setting_of_a_recipe_may_be_infinite(command: str, field: str, value: str) -> None:
    names = {"sample": "demo/sample", "train-unet": "demo/unet"}
    with pytest.raises(RecipeError) as caught:
        load_recipe(names[command], (f"{field}={value}",), command)
    assert any(field in problem for problem in caught.value.problems)


@pytest.mark.parametrize("scale", [1e30, 1e5])
def test_guidance_is_bounded(scale: float) -> None:
    with pytest.raises(ValueError, match="less than or equal to 1000"):
        SampleRecipe.from_mapping({"command": "sample", "model": "m", "sampling": {"guidance": scale}})
