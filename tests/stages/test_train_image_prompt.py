"""`ldm train-unet` with `image_prompt`: an adapter is trained, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from ldm_cli.core.condition import Condition
from ldm_cli.errors import CheckpointError, DataError, InputNotFoundError
from ldm_cli.families.open_family import open_family, resolve_model
from ldm_cli.pictures.images import read_image, save_image
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import convert
from ldm_cli.stages.convert import ConvertOptions
from ldm_cli.stages.dry_run import dry_run
from ldm_cli.stages.support.batch_encoder import BatchEncoder, cache_key
from ldm_cli.stages.support.image_prompt_task import ImagePromptTask
from ldm_cli.stages.support.start import resolve_start
from ldm_cli.storage import file_sha256

from .test_sample import draw
from .test_train_pixels import pixel_recipe
from .tiny import (
    RESNET,
    assert_resumes,
    cached,
    clip_recipe,
    decoder_recipe,
    prior_recipe,
    trained,
    unet_recipe,
)
from .tiny_xl import save_tiny_xl, xl_recipe

PLUS = {"kind": "plus", "num_tokens": 3, "width": 64}


def prompt_recipe(
    scenes: Path, start: Path, encoder: Path, prompt: dict[str, Any] | None = None, **train: Any
) -> dict[str, Any]:
    recipe = unet_recipe(scenes, Path(), Path(), {"caption_dropout": 0.2}, **{"lr": 1e-2, **train})
    kept = {name: value for name, value in recipe.items() if name not in ("unet", "vae", "text_encoder")}
    section = {"image_encoder": str(encoder), "image_dropout": 0.2, "text_dropout": 0.2, **(prompt or {})}
    return kept | {"start_from": str(start), "image_prompt": section}


@pytest.mark.parametrize("prompt", [{}, PLUS], ids=["base", "plus"])
def test_a_run_trains_an_adapter_and_leaves_its_model_alone(
    prompt: dict[str, Any], scenes: Path, unet_run: Path, clip_run: Path, tmp_path: Path
) -> None:
    before = {file: file_sha256(file) for file in unet_run.rglob("*.safetensors")}
    recipe = prompt_recipe(scenes, unet_run, clip_run / "model", prompt, ema_decay=0.9, sample_every=6)
    result = trained(recipe, tmp_path / "run")
    assert {file: file_sha256(file) for file in unet_run.rglob("*.safetensors")} == before
    files = sorted(str(file.relative_to(tmp_path / "run/model")) for file in (tmp_path / "run/model").rglob("*.*"))
    encoder = [f"image_encoder/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")]
    assert files == [*encoder, "ip_adapter.safetensors", "manifest.json"]
    found = load_file(tmp_path / "run/model/ip_adapter.safetensors")
    unet = load_file(unet_run / "model/unet/diffusion_pytorch_model.safetensors")
    # The middle has the last number; two layers of the way up come before.
    middle = "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert sorted(name for name in found if name.endswith("to_k_ip.weight")) == [
        f"ip_adapter.{n}.to_k_ip.weight" for n in (1, 3, 5, 7)
    ]
    change = (found["ip_adapter.7.to_v_ip.weight"] - unet[f"{middle}.to_v.weight"]).abs().max()
    assert 0 < change < 0.3, "it begins as the text's"
    assert result["figures"]["val_loss"] > 0
    assert (tmp_path / "run/samples/step-00000006/grid.png").is_file()


def test_a_lost_run_ends_in_the_same_bits(scenes: Path, unet_run: Path, clip_run: Path, tmp_path: Path) -> None:
    recipe = prompt_recipe(scenes, unet_run, clip_run / "model", PLUS, steps=6, save_every=3, ema_decay=0.9)
    assert_resumes(recipe, tmp_path, 3)


@pytest.mark.parametrize("prompt", [pytest.param({}, marks=pytest.mark.exhaustive), PLUS], ids=["base", "plus"])
def test_cached_embeddings_of_pictures_train_the_same_bits(
    prompt: dict[str, Any], scenes: Path, unet_run: Path, clip_run: Path, tmp_path: Path
) -> None:
    recipe = prompt_recipe(scenes, unet_run, clip_run / "model", prompt, steps=2)
    recipe["data"]["flip_probability"] = 0.5
    for name, one in (("images", recipe), ("cache", cached(recipe, tmp_path / "cache"))):
        trained(one, tmp_path / name)
    files = [tmp_path / name / "model/ip_adapter.safetensors" for name in ("images", "cache")]
    assert file_sha256(files[0]) == file_sha256(files[1])


def test_a_cache_is_stale_for_another_image_encoder_or_without_one(
    scenes: Path, unet_run: Path, clip_run: Path, tmp_path: Path
) -> None:
    recipe = prompt_recipe(scenes, unet_run, clip_run / "model", steps=1) | {"cache": str(tmp_path / "cache")}
    plain = {name: value for name, value in recipe.items() if name != "image_prompt"}
    cached(plain, tmp_path / "cache")
    with pytest.raises(DataError, match=r"image_prompt\.image_encoder was null and is"):
        trained(recipe, tmp_path / "run")
    cached(recipe, tmp_path / "cache", overwrite=True)
    recipe["image_prompt"] |= PLUS
    with pytest.raises(DataError, match=r'image_prompt\.kind was "base" and is "plus"'):
        trained(recipe, tmp_path / "run")


def test_dropped_samples_get_what_stands_for_nothing(
    scenes: Path, unet_run: Path, clip_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text alone, picture alone, both, none: each about as often as the recipe says, and each as sampling has it."""
    seen: list[tuple[Condition, Condition, ImagePromptTask]] = []
    loss = ImagePromptTask.loss

    def watched(self: ImagePromptTask, part: Any, step: int) -> Any:
        denoising, error = self._base.denoising, self._base.denoising._error

        def noted(batch: Any, moments: Any, condition: Condition, *rest: Any) -> Any:
            seen.append((condition, denoising.empty, self))
            return error(batch, moments, condition, *rest)

        monkeypatch.setattr(denoising, "_error", noted)
        result = loss(self, part, step)
        monkeypatch.setattr(denoising, "_error", error)
        return result

    monkeypatch.setattr(ImagePromptTask, "loss", watched)
    short = {"steps": 12, "batch_size": 16, "validation_samples": 4}
    trained(prompt_recipe(scenes, unet_run, clip_run / "model", **short), tmp_path / "run")
    counts = {"both": 0, "text": 0, "image": 0, "none": 0}
    for condition, empty, _ in seen:
        assert condition.tokens is not None
        assert condition.image_tokens is not None
        assert empty.tokens is not None
        assert empty.image_tokens is not None
        no_text = (condition.tokens == empty.tokens).flatten(1).all(1)
        no_image = (condition.image_tokens == empty.image_tokens).flatten(1).all(1)
        counts["both"] += int((no_text & no_image).sum())
        counts["text"] += int((no_text & ~no_image).sum())
        counts["image"] += int((~no_text & no_image).sum())
        counts["none"] += int((~no_text & ~no_image).sum())
    total = sum(counts.values())
    assert total == 12 * 16
    for name, share in {"both": 0.2, "text": 0.16, "image": 0.16, "none": 0.48}.items():
        assert abs(counts[name] / total - share) < 4 * (share * (1 - share) / total) ** 0.5
    task = seen[0][2]
    assert torch.equal(task._no_image, torch.zeros(1, 16))


def test_parts_of_a_batch_and_recomputed_layers_change_only_rounding(
    scenes: Path, unet_run: Path, clip_run: Path, tmp_path: Path
) -> None:
    moments = []
    for name, train in (("whole", {}), ("parts", {"micro_batch": 2, "gradient_checkpointing": True})):
        trained(prompt_recipe(scenes, unet_run, clip_run / "model", PLUS, steps=1, **train), tmp_path / name)
        moments.append(load_file(tmp_path / name / "checkpoints/step-00000001/training.safetensors"))
    whole, parts = moments
    names = [name for name in whole if name.endswith("exp_avg")]
    assert names
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-3, atol=1e-7) for name in names)


def test_xl_is_prompted_in_half_precision(scenes: Path, clip_run: Path, tmp_path: Path) -> None:
    save_tiny_xl(tmp_path / "xl")
    short = {"steps": 2, "validation_samples": 4, "precision": "bf16"}
    recipe = prompt_recipe(scenes, tmp_path / "xl", clip_run / "model", **short)
    recipe["data"] = xl_recipe(scenes, {})["data"]
    trained(recipe, tmp_path / "run")
    found = load_file(tmp_path / "run/model/ip_adapter.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert (
        found["image_proj.proj.weight"].shape[0] == 4 * open_family(tmp_path / "xl").denoiser.config.cross_attention_dim
    )


@pytest.mark.parametrize("kind", ["pixels", pytest.param("unclip", marks=pytest.mark.exhaustive)])
def test_other_models_with_text_are_prompted_too(
    kind: str, scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    """Of unCLIP the picture's embedding and the tokens of the adapter add up."""
    clip, model = clip_run / "model", tmp_path / "base"
    train = {"steps": 8, "lr": 3e-2, "validation_samples": 4}
    if kind == "pixels":
        trained(pixel_recipe(scenes, clip, **train), model)
    else:
        trained(decoder_recipe(scenes, clip, vae_run / "model", **train), model)
        trained(prior_recipe(scenes, clip, steps=1, validation_samples=4), tmp_path / "prior")
        convert.run(model, tmp_path / "whole", ConvertOptions(prior=tmp_path / "prior"), SilentReporter())
    trained(prompt_recipe(scenes, model, clip, steps=2, validation_samples=4), tmp_path / "run")
    save_image(tmp_path / "picture.png", torch.full((3, 32, 32), 200, dtype=torch.uint8))
    given = {"image": str(tmp_path / "picture.png"), "adapter": str(tmp_path / "run")}
    found = []
    for name, prompts in {"text": [], "zero": [given | {"scale": 0.0}], "both": [given | {"scale": 50.0}]}.items():
        result = draw(model if kind == "pixels" else tmp_path / "whole", tmp_path / name, image_prompts=prompts)
        found.append(read_image(Path(result["images"][0]["file"])))
    text, zero, both = found
    assert torch.equal(zero, text)
    assert not torch.equal(both, text)


def test_a_decoder_and_an_adapter_have_image_encoders_of_their_own(
    scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    clip = clip_run / "model"
    trained(decoder_recipe(scenes, clip, vae_run / "model", steps=1, validation_samples=4), tmp_path / "decoder")
    recipe = resolve_start(TrainUnetRecipe.from_mapping(prompt_recipe(scenes, tmp_path / "decoder", clip)), print)
    networks = BatchEncoder(recipe, torch.device("cpu"), print).networks
    names = [name for name in networks if "image_encoder" in name]
    assert names == ["image_encoder", "image_prompt.image_encoder"]
    assert set(names) < set(cache_key(recipe).latents)
    assert not any(weight.requires_grad for name in names for weight in networks[name].parameters())
    parameters = dry_run(recipe, SilentReporter())["parameters"]
    assert parameters["image_encoder"] == parameters["image_prompt.image_encoder"]


def test_a_dry_run_counts_the_adapter(scenes: Path, unet_run: Path, clip_run: Path, tmp_path: Path) -> None:
    recipe = prompt_recipe(scenes, unet_run, clip_run / "model")
    result = dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())
    assert result["parameters"]["image_prompt"] == 64 * 16 + 64 + 2 * 16 + 8 * 8 * 16
    assert result["bytes"]["gradients"] == 4 * result["parameters"]["image_prompt"]
    recipe["image_prompt"]["image_encoder"] = str(tmp_path / "later")
    assert any("later" in note for note in dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())["notes"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": None, "unet": {}, "vae": "v", "text_encoder": "t"}, "image_prompt needs start_from"),
        ({"freeze": ["conv_in.*"]}, "does not go with freeze"),
        ({"lora": {"rank": 2}}, "does not go with lora"),
        ({"train": {"steps": 1, "batch_size": 1, "strategy": "sharded"}}, "does not work with train.strategy=sharded"),
        ({"image_prompt": {"image_encoder": "e", "image_dropout": 0.6, "text_dropout": 0.6}}, "1.2 together"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = prompt_recipe(tmp_path, tmp_path, tmp_path) | changes
    with pytest.raises(ValidationError, match=message):
        TrainUnetRecipe.from_mapping(recipe)


def test_a_run_of_an_adapter_is_no_model(scenes: Path, unet_run: Path, clip_run: Path, tmp_path: Path) -> None:
    trained(prompt_recipe(scenes, unet_run, clip_run / "model", steps=1), tmp_path / "run")
    with pytest.raises(InputNotFoundError, match="it holds an image prompt adapter") as caught:
        resolve_model(tmp_path / "run")
    assert "--ip-adapter" in str(caught.value.remedy)


def test_a_resnet_is_no_image_encoder(scenes: Path, unet_run: Path, tmp_path: Path) -> None:
    trained(clip_recipe(scenes, RESNET, steps=1), tmp_path / "clip")
    with pytest.raises(CheckpointError, match="its image tower is a ResNet"):
        trained(prompt_recipe(scenes, unet_run, tmp_path / "clip/model", steps=1), tmp_path / "run")
