"""Stable Diffusion XL against diffusers: its folders in ours, ours in its pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.errors import CheckpointError
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from tests.parity import test_editing as editing
from tests.parity.their_pipeline import NEGATIVE, PROMPTS, latents
from tests.parity.xl_pipeline import SCHEDULER, change, their_xl_folder
from tests.sampling.tiny import loaded_pipeline
from tests.stages.published_xl import published_models

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SMALL = {"original": [40, 30], "crop": [3, 7], "target": [32, 16]}
LARGE = {"original": [900, 1200], "crop": [0, 0], "target": [1024, 1024]}


def ours(folder: Path, **fields: Any) -> Tensor:
    config = SamplingConfig.from_mapping({"steps": 5, "guidance": 4.0, "sampler": "euler"} | fields)
    requests = [ImageRequest(prompt, 0) for prompt in PROMPTS]
    return torch.stack([image.pixels for image in loaded_pipeline(folder).generate(requests, config, latents())])


def theirs(folder: Path, **given: Any) -> Tensor:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 16, "width": 16} | given
    # One by one: diffusers gives the sizes of the negative prompt to the wrong rows of several pictures.
    images = [
        torch.from_numpy(pipeline(prompt, latents=start[None], output_type="np", **given).images)
        for prompt, start in zip(PROMPTS, latents(), strict=True)
    ]
    return (torch.cat(images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


def their_sizes(sizes: dict[str, list[int]], prefix: str = "") -> dict[str, tuple[int, ...]]:
    names = {"original": "original_size", "crop": "crops_coords_top_left", "target": "target_size"}
    return {prefix + names[name]: tuple(value) for name, value in sizes.items()}


def assert_alike(found: Tensor, expected: Tensor) -> None:
    assert expected.float().std() > 10, "flat pictures prove nothing"
    assert (found.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("seed", range(4))
def test_their_folder_is_sampled_as_their_pipeline_samples_it(tmp_path: Path, seed: int) -> None:
    folder = their_xl_folder(tmp_path, seed)
    assert_alike(ours(folder), theirs(folder))


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_pictures_are_conditioned_on_the_sizes_that_are_asked_for(tmp_path: Path, sizes: dict[str, list[int]]) -> None:
    folder = their_xl_folder(tmp_path)
    found = ours(folder, sizes=sizes)
    assert_alike(found, theirs(folder, **their_sizes(sizes)))
    assert not torch.equal(found, ours(folder))


def test_the_negative_prompt_may_have_sizes_of_its_own(tmp_path: Path) -> None:
    folder = their_xl_folder(tmp_path)
    found = ours(folder, negative=NEGATIVE, sizes=LARGE, negative_sizes=SMALL)
    given = their_sizes(LARGE) | their_sizes(SMALL, "negative_")
    assert_alike(found, theirs(folder, negative_prompt=NEGATIVE, **given))
    assert not torch.equal(found, ours(folder, negative=NEGATIVE, sizes=LARGE))


def test_the_empty_prompt_is_zeros_where_the_folder_says_so(tmp_path: Path) -> None:
    folder = their_xl_folder(tmp_path, index={"force_zeros_for_empty_prompt": False})
    encoded = ours(folder)
    assert_alike(encoded, theirs(folder))
    change(folder / "model_index.json", force_zeros_for_empty_prompt=True)
    assert_alike(ours(folder), theirs(folder))
    assert not torch.equal(ours(folder), encoded)
    empty = open_family(folder).encoder.encode_prompts([""], PromptReading(), num_chunks=1, warn=pytest.fail)
    assert not any(tensor.any() for tensor in empty.tensors.values())


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_folder_that_we_write_opens_in_diffusers_and_gives_the_same_pictures(tmp_path: Path, zeroes: bool) -> None:
    given = their_xl_folder(tmp_path, seed=1, index={"force_zeros_for_empty_prompt": zeroes})
    open_family(given).save(tmp_path / "ours")
    assert_alike(ours(tmp_path / "ours"), theirs(tmp_path / "ours"))
    assert torch.equal(ours(tmp_path / "ours"), ours(given))


@pytest.mark.parametrize("offset", [0, 1])
def test_the_offset_of_the_steps_is_what_the_file_says(tmp_path: Path, offset: int) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULER, timestep_spacing="leading")
    folder = their_xl_folder(tmp_path, scheduler=scheduler)
    change(folder / "scheduler/scheduler_config.json", steps_offset=offset)
    assert_alike(ours(folder), theirs(folder))


def test_a_scheduler_that_clips_is_refused(tmp_path: Path) -> None:
    folder = their_xl_folder(tmp_path, scheduler=diffusers.DDIMScheduler(clip_sample=True))
    with pytest.raises(CheckpointError, match="clip_sample=True is not supported"):
        open_family(folder)


@pytest.mark.parametrize("strength", [0.4, 0.9])
def test_a_picture_is_worked_on_as_by_the_img2img_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    folder = their_xl_folder(tmp_path)
    change(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    module = diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    expected = editing.theirs(kind, folder, monkeypatch, module, "euler", strength, safety_checker=False)
    assert (editing.ours(folder, "euler", strength, None).int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("in_channels", [4, 9])
def test_a_hole_is_filled_as_by_the_inpainting_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_channels: int
) -> None:
    folder = their_xl_folder(tmp_path, in_channels=in_channels)
    change(folder / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
    module = diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint
    kind = diffusers.StableDiffusionXLInpaintPipeline
    editing.assert_filled_alike(kind, folder, monkeypatch, module, "euler", 1.0, safety_checker=False)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "it is a refiner"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type=None, expected text_time"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 9}, "the first takes 9 tokens, the second 77"),
        ("text_encoder_2/config.json", {"vocab_size": 30}, r"\[551, \d+\], not \[30, \d+\]"),
    ],
)
def test_what_cannot_be_used_is_refused_and_so_is_its_outline(
    tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    folder = their_xl_folder(tmp_path)
    assert outline_family(folder).keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}
    change(folder / file, **values)
    if "addition_embed_type" in values:
        (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
        fields = diffusers.UNet2DConditionModel.load_config(folder / "unet")
        diffusers.UNet2DConditionModel.from_config(fields).save_pretrained(folder / "unet")
    for read in (open_family, outline_family):
        with pytest.raises(CheckpointError, match=message):
            read(folder)


def test_another_number_of_pooled_features_is_refused(tmp_path: Path) -> None:
    folder = their_xl_folder(tmp_path, addition_time_embed_dim=4)
    with pytest.raises(CheckpointError, match=r"numbers of pooled text and 6 sizes of 4 make \d+"):
        open_family(folder)


@pytest.mark.parametrize("seed", range(4))
def test_both_text_encoders_give_the_conditions_of_diffusers(tmp_path: Path, seed: int) -> None:
    folder = their_xl_folder(tmp_path, seed)
    encoder: Any = open_family(folder).encoder
    found = encoder.encode_tokens(encoder.tokens(PROMPTS))
    with torch.no_grad():
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
        tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert found.tokens is not None
    assert found.pooled is not None
    assert min(tokens.std(), pooled.std()) > 0.1
    assert (found.tokens - tokens).abs().max() <= 1e-5
    assert (found.pooled - pooled).abs().max() <= 1e-5


def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items() if not name.endswith("position_ids")}


def test_the_published_networks_are_those_of_diffusers_and_transformers() -> None:
    """On the meta device: names, shapes and numbers of parameters."""
    counts = [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    with torch.device("meta"):
        for found, count in zip(published_models().values(), counts, strict=True):
            mapping, name = found.config.to_hugging_face(), type(found).__name__
            if isinstance(found.config, CLIPTextConfig):
                expected = getattr(transformers, name)(transformers.CLIPTextConfig(**mapping))
            else:
                expected = getattr(diffusers, name).from_config(mapping)
            their_shapes = shapes(expected)
            if name == "CLIPTextModel":
                prefix = "text_model."
                their_shapes = {prefix + n.removeprefix(prefix): shape for n, shape in their_shapes.items()}
            assert shapes(found) == their_shapes
            assert sum(parameter.numel() for parameter in found.parameters()) == count
