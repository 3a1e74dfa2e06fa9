"""Stable Diffusion 3 against diffusers: its folders in ours, ours in its pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.errors import UsageError
from ldm_cli.families.adapted import AdaptedNetworks, adaptable_models, adaptable_networks
from ldm_cli.families.lora_file import write_lora
from ldm_cli.families.lora_reader import read_lora
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from tests.parity import test_editing as editing
from tests.parity.sd3_pipeline import their_sd3_folder
from tests.parity.test_lora import random_updates, weights_of
from tests.parity.test_xl import assert_alike
from tests.parity.their_pipeline import NEGATIVE, PROMPTS, latents
from tests.parity.xl_pipeline import change
from tests.sampling.tiny import loaded_pipeline

diffusers = pytest.importorskip("diffusers")


def ours(folder: Path, **fields: Any) -> Tensor:
    config = SamplingConfig.from_mapping({"steps": 5, "guidance": 4.0} | fields)
    requests = [ImageRequest(prompt, 0) for prompt in PROMPTS]
    return torch.stack([image.pixels for image in loaded_pipeline(folder).generate(requests, config, latents())])


def theirs(folder: Path, **given: Any) -> Tensor:
    has_t5 = (folder / "text_encoder_3").is_dir()
    absent = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 16, "width": 16} | given
    images = pipeline(PROMPTS, latents=latents(), output_type="np", **given).images
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


@pytest.mark.parametrize(("seed", "has_t5"), [(0, False), (1, True), (2, False), (3, True)])
def test_their_folder_is_sampled_as_their_pipeline_samples_it(tmp_path: Path, seed: int, has_t5: bool) -> None:
    folder = their_sd3_folder(tmp_path, seed, has_t5=has_t5)
    assert_alike(ours(folder), theirs(folder))


def test_sizes_that_the_transformer_cannot_take_are_refused(tmp_path: Path) -> None:
    """The tiny model has patches of 2 latents of 2 pixels, and positions for 12 of them."""
    pipeline = loaded_pipeline(their_sd3_folder(tmp_path))
    with pytest.raises(UsageError, match="height 18 is not possible: not a multiple of 4; take 16"):
        pipeline.image_size(SamplingConfig(height=18, width=16))
    with pytest.raises(UsageError, match="width 52 is not possible: the denoiser has positions for 48 pixels"):
        pipeline.image_size(SamplingConfig(height=48, width=52))
    assert pipeline.image_size(SamplingConfig(height=48, width=20)) == (48, 20)


def test_a_negative_prompt_is_that_of_all_encoders(tmp_path: Path) -> None:
    folder = their_sd3_folder(tmp_path)
    found = ours(folder, negative=NEGATIVE)
    assert_alike(found, theirs(folder, negative_prompt=[NEGATIVE] * len(PROMPTS)))
    assert not torch.equal(found, ours(folder))


@pytest.mark.parametrize("has_t5", [True, False])
def test_a_folder_that_we_write_opens_in_diffusers_and_gives_the_same_pictures(tmp_path: Path, has_t5: bool) -> None:
    given = their_sd3_folder(tmp_path, seed=1, has_t5=has_t5)
    open_family(given).save(tmp_path / "ours")
    assert_alike(ours(tmp_path / "ours"), theirs(tmp_path / "ours"))
    assert torch.equal(ours(tmp_path / "ours"), ours(given))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_by_the_size_of_the_picture_is_theirs(tmp_path: Path, kind: str) -> None:
    fields = {"base_image_seq_len": 4, "max_image_seq_len": 30, "base_shift": 0.5, "max_shift": 1.5}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, **fields)
    folder = their_sd3_folder(tmp_path, scheduler=scheduler)
    found = ours(folder)
    assert_alike(found, theirs(folder))
    open_family(folder).save(tmp_path / "ours")
    assert torch.equal(ours(tmp_path / "ours"), found)
    change(folder / "scheduler/scheduler_config.json", max_shift=0.5)
    assert not torch.equal(ours(folder), found)


def test_layers_are_skipped_as_by_their_pipeline(tmp_path: Path) -> None:
    folder = their_sd3_folder(tmp_path, seed=3)
    perturb = {"kind": "layer", "scale": 2.8, "layers": ["transformer_blocks.0"]}
    given = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 2.0}
    found = ours(folder, guidance={"scale": 4.0, "perturb": perturb})
    assert_alike(found, theirs(folder, **given))
    assert not torch.equal(found, ours(folder))


def theirs_edited(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, strength: float, noise: Tensor, **given: Any
) -> Tensor:
    module = getattr(diffusers.pipelines.stable_diffusion_3, f"pipeline_stable_diffusion_3_{kind.lower()}")
    pipeline = getattr(diffusers, f"StableDiffusion3{kind}Pipeline").from_pretrained(folder)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(module, "retrieve_latents", lambda output, **_: output.latent_dist.mode())
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        image=(editing.picture()[None].float() / 127.5 - 1).expand(2, -1, -1, -1),
        strength=strength,
        num_inference_steps=editing.STEPS,
        guidance_scale=4.0,
        height=16,
        width=16,
        output_type="latent",
        **given,
    ).images
    # The inpainting pipeline of diffusers 0.42 decodes without the shift.
    codec = pipeline.vae
    with torch.no_grad():
        images = codec.decode(found / codec.config.scaling_factor + codec.config.shift_factor).sample
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_a_picture_is_worked_on_as_by_the_img2img_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    folder = their_sd3_folder(tmp_path)
    expected = theirs_edited("Img2Img", folder, monkeypatch, strength, latents())
    assert_alike(editing.ours(folder, None, strength, None), expected)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_hole_is_filled_as_by_the_inpainting_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    folder, hole, noise = their_sd3_folder(tmp_path, channels=16), editing.mask(), latents(16)
    expected = theirs_edited("Inpaint", folder, monkeypatch, strength, noise, mask_image=hole[None, None].float())
    found = editing.ours(folder, None, strength, hole, noise)
    assert_alike(found[:, :, hole], expected[:, :, hole])


def test_an_outline_names_the_parts(tmp_path: Path) -> None:
    folder = their_sd3_folder(tmp_path)
    parts = outline_family(folder)
    assert set(parts) == {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    assert set(parts) == set(open_family(folder).weights_sha256)


def test_adapters_of_transformer_and_text_towers_are_applied_as_diffusers_applies_them(tmp_path: Path) -> None:
    folder = their_sd3_folder(tmp_path / "model")
    family = open_family(folder)
    networks = adaptable_networks(family)
    assert list(networks) == ["transformer", "text_encoder", "text_encoder_2"]
    # diffusers loses the rank of the projection, a module outside of the towers' layers.
    updates = {
        name: {module: update for module, update in own.items() if module != "text_projection"}
        for name, own in random_updates(networks).items()
    }
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", updates, "diffusers", {})
    before = family.denoiser.state_dict()["norm_out.linear.weight"].clone()
    adapters = read_lora(tmp_path, adaptable_models(networks))
    AdaptedNetworks(networks, {"a": adapters}).use({"a": 1.0})
    assert not torch.equal(family.denoiser.state_dict()["norm_out.linear.weight"], before)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora(components=list(networks))
    for name, network in networks.items():
        their = {key.replace(".base_layer", ""): value for key, value in getattr(pipeline, name).state_dict().items()}
        for module, weight in weights_of(network).items():
            expected = their[f"{module}.weight"]
            assert (weight - expected.view_as(weight)).abs().max() <= 1e-5 * expected.abs().max(), f"{name}.{module}"
