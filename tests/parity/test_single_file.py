"""Single files against diffusers, in both directions, and back into folders: the same tensors, the same pictures."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.families.clip_folder import open_clip
from ldm_cli.formats.json_file import read_json
from ldm_cli.formats.model_source import load_tensors, weights_sha256
from ldm_cli.formats.scheduler_file import read_scheduler
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_input import EditInput
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.sample_options import SampleOptions
from ldm_cli.stages import convert
from ldm_cli.stages.convert import ConvertOptions
from tests.parity import original_names
from tests.sampling.tiny import loaded_pipeline, randomize, special_ids, tiny_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

run = partial(convert.run, reporter=SilentReporter())
PROMPTS, NEGATIVE = ["a small red circle at the top left", "a blue square"], "green"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KINDS = {
    "sd1": {},
    "inpainting": {"in_channels": 9},
    "sd2": {"use_linear_projection": True, "sample_size": 96},
    "xl": {"use_linear_projection": True, "addition_embed_type": "text_time", "sample_size": 128},
}

SEEDS = [0, 1, pytest.param(2, marks=pytest.mark.exhaustive)]
"""Of the shapes of a pipeline."""


def text_config(choose: random.Random, tokenizer: Any, activation: str, heads: int) -> Any:
    """A tower with heads of 64, as all published ones."""
    return transformers.CLIPTextConfig(
        **special_ids(tokenizer),
        hidden_size=64 * heads,
        intermediate_size=choose.choice([32, 56]),
        num_hidden_layers=choose.choice([1, 2]),
        num_attention_heads=heads,
        projection_dim=choose.choice([24, 40]),
        hidden_act=activation,
    )


def their_pipeline(kind: str, seed: int, folder: Path) -> Any:
    """A pipeline with drawn shapes, and with heads, groups and activations of the published models."""
    choose, tokenizer = random.Random(seed), tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    tokenizer.save(folder / "tokenizer_2")
    levels, is_linear = choose.choice([2, 3]), "use_linear_projection" in KINDS[kind]
    channels = [(64 if is_linear else 32) * choose.choice([1, 2]) for _ in range(levels)]
    # diffusers tells the towers of XL by their widths.
    heads = choose.sample([1, 2], 2)
    first = text_config(choose, tokenizer, "gelu" if kind == "sd2" else "quick_gelu", heads[0])
    second = text_config(choose, tokenizer, "gelu", heads[1])
    attended = [choose.random() < 0.6 for _ in range(levels)]
    fields: dict[str, Any] = {
        "sample_size": 64,
        "block_out_channels": channels,
        "layers_per_block": choose.choice([1, 2]),
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attended)],
        "cross_attention_dim": first.hidden_size + (second.hidden_size if kind == "xl" else 0),
        "attention_head_dim": [width // 64 for width in channels] if is_linear else 8,
        **KINDS[kind],
    }
    if kind == "xl":
        fields["transformer_layers_per_block"] = [choose.choice([1, 2]) if one else 1 for one in attended]
        fields |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": second.projection_dim + 48}
    vae_channels = [32 * choose.choice([1, 2]) for _ in range(choose.choice([1, 2]))]
    vae = diffusers.AutoencoderKL(
        block_out_channels=vae_channels,
        layers_per_block=choose.choice([1, 2]),
        down_block_types=["DownEncoderBlock2D"] * len(vae_channels),
        up_block_types=["UpDecoderBlock2D"] * len(vae_channels),
        scaling_factor=0.13025 if kind == "xl" else 0.18215,
    )
    models = {
        "vae": randomize(vae, 1),
        "text_encoder": randomize(transformers.CLIPTextModel(first), 2),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "unet": randomize(diffusers.UNet2DConditionModel(**fields), 3),
    }
    if kind == "xl":
        models["text_encoder_2"] = randomize(transformers.CLIPTextModelWithProjection(second), 4)
        models["tokenizer_2"] = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
        return diffusers.StableDiffusionXLPipeline(**models, scheduler=scheduler)
    if kind == "sd2":
        solver = {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False}
        scheduler = diffusers.DDIMScheduler(**BETAS, **solver)
    else:
        scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True)
    classes = {"inpainting": diffusers.StableDiffusionInpaintPipeline}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return classes.get(kind, diffusers.StableDiffusionPipeline)(**models, scheduler=scheduler, **none)


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def hole(side: int) -> torch.Tensor:
    found = torch.zeros(side, side, dtype=torch.bool)
    found[side // 4 : side // 2, : side // 2] = True
    return found


def our_images(path: Path, side: int, picture: torch.Tensor | None) -> torch.Tensor:
    """Pictures of side x side px; `picture` [3, H, W] is the one whose hole is filled."""
    config = SamplingConfig(steps=4, guidance=7.5, negative=NEGATIVE, width=side, height=side)
    edit = None if picture is None else EditInput(picture, hole(side), (side, side), 1.0)
    requests = [ImageRequest(prompt, 0) for prompt in PROMPTS]
    images = loaded_pipeline(path).generate(requests, config, noise(), options=SampleOptions(edit_input=edit))
    return torch.stack([image.pixels for image in images])


def their_images(pipeline: Any, side: int, picture: torch.Tensor | None) -> torch.Tensor:
    """The same of diffusers."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 7.5, "latents": noise(), "output_type": "np"}
    if picture is not None:
        image = (picture[None].float() / 127.5 - 1).expand(2, -1, -1, -1)
        options |= {"image": image, "mask_image": hole(side)[None, None].float(), "strength": 1.0}
    result = pipeline(PROMPTS, negative_prompt=[NEGATIVE] * 2, height=side, width=side, **options)
    return (torch.from_numpy(result.images).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_gives_the_pictures_that_diffusers_generates(
    kind: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = their_pipeline(kind, seed, tmp_path)
    file = original_names.write(pipeline, tmp_path / "model.safetensors")
    side, picture, inside = 8 * pipeline.vae_scale_factor, None, slice(None)
    if kind == "inpainting":
        picture = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
        module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint
        monkeypatch.setattr(module, "retrieve_latents", lambda output, **_: output.latent_dist.mode())
        inside = hole(side)
    expected = their_images(pipeline, side, picture)[..., inside]
    found = our_images(file, side, picture)[..., inside]
    assert expected.float().std() > 10
    assert (found.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_folder_to_file_to_folder_keeps_each_tensor_and_the_file_opens_in_diffusers(
    kind: str, seed: int, tmp_path: Path
) -> None:
    pipeline = their_pipeline(kind, seed, tmp_path)
    pipeline.save_pretrained(tmp_path / "their")
    file = tmp_path / "ours.safetensors"
    run(tmp_path / "their", file, ConvertOptions())
    bare = original_names.write(pipeline, tmp_path / "theirs.safetensors")
    ours, theirs = load_file(file), load_file(bare)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    opened = type(pipeline).from_single_file(str(file), config=str(tmp_path / "their"), local_files_only=True)
    parts = [name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
    for name in parts:
        before, after = getattr(pipeline, name).state_dict(), getattr(opened, name).state_dict()
        assert set(before) == set(after)
        assert all(torch.equal(before[n], after[n]) for n in before)
    # The one knows its configurations, the other is known by its shapes.
    for source in (file, bare):
        back = tmp_path / f"from-{source.stem}"
        run(source, back, ConvertOptions())
        for name in parts:
            before, after = load_tensors(tmp_path / "their" / name), load_tensors(back / name)
            after = {n.removeprefix("text_model.") if n not in before else n: t for n, t in after.items()}
            assert set(before) == set(after)
            assert all(torch.equal(before[n], after[n]) for n in before)
            assert weights_sha256(source / name) == weights_sha256(back / name)
        assert configs_of(back, parts) == configs_of(tmp_path / "their", parts)
    for name in parts:
        alone = tmp_path / f"{name}.safetensors"
        run(tmp_path / "their" / name, alone, ConvertOptions())
        run(alone, tmp_path / name, ConvertOptions())
        before, after = load_tensors(tmp_path / "their" / name), load_tensors(tmp_path / name)
        assert set(before) == {n if n in before else n.removeprefix("text_model.") for n in after}
        assert weights_sha256(tmp_path / "their" / name) == weights_sha256(tmp_path / name)
        theirs, ours = (read_json(folder / name / "config.json") for folder in (tmp_path / "their", tmp_path))
        not_in_shapes = ("attention_head_dim", "num_attention_heads", "hidden_act", "scaling_factor")
        assert [ours.get(field) for field in not_in_shapes] == [theirs.get(field) for field in not_in_shapes]


def configs_of(folder: Path, parts: list[str]) -> dict[str, Any]:
    """The fields that a network's numbers depend on, and what its parts are for."""
    index = read_json(folder / "model_index.json")
    unet = UNet2DConditionConfig.from_hugging_face(read_json(folder / "unet" / "config.json"))
    towers = [read_json(folder / name / "config.json") for name in parts if name.startswith("text")]
    return {
        "classes": {name: index[name] for name in ("_class_name", "tokenizer", "scheduler", *parts)},
        "heads": [unet.per_level(unet.attention_head_dim)[level] for level in unet.levels_with_text()],
        "unet": unet.to_mapping() | dict.fromkeys(("attention_head_dim", "transformer_layers_per_block")),
        "vae": AutoencoderKLConfig.from_hugging_face(read_json(folder / "vae" / "config.json")).scaling_factor,
        "towers": [(tower["num_attention_heads"], tower["hidden_act"]) for tower in towers],
        "process": read_scheduler(folder).diffusion,
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip_goes_from_openais_names_to_transformers_and_back(seed: int, activation: str, tmp_path: Path) -> None:
    choose, tokenizer = random.Random(seed), tiny_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    text = text_config(choose, tokenizer, activation, choose.choice([1, 2])).to_dict()
    vision = {"hidden_size": 64 * choose.choice([1, 2]), "intermediate_size": 48, "patch_size": choose.choice([4, 8])}
    vision |= {"num_attention_heads": vision["hidden_size"] // 64, "num_hidden_layers": 2, "image_size": 32}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**vision, "hidden_act": activation}, projection_dim=choose.choice([24, 40])
    )
    theirs = randomize(transformers.CLIPModel(config), 5)
    theirs.save_pretrained(tmp_path / "their")
    original = original_names.open_clip(theirs.state_dict())
    marks = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)} if "quick" in activation else {}
    save_file({n: t.contiguous() for n, t in (original | marks).items()}, tmp_path / "original.safetensors")
    run(tmp_path / "their", tmp_path / "ours.safetensors", ConvertOptions())
    ours = load_file(tmp_path / "ours.safetensors")
    assert set(ours) == set(original)
    assert all(torch.equal(ours[name], original[name]) for name in ours)
    run(tmp_path / "original.safetensors", tmp_path / "back", ConvertOptions(tokenizer=tmp_path / "tokenizer"))
    again = transformers.CLIPModel.from_pretrained(tmp_path / "back").eval()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    ids, pixels = tokenizer.encode(PROMPTS, 20).input_ids, torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(ids, pixels).logits_per_image, theirs(ids, pixels).logits_per_image)
    model, _, _ = open_clip(tmp_path / "original.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_is_the_folder_that_diffusers_saves_of_it(dtype: torch.dtype, tmp_path: Path) -> None:
    pipeline = their_pipeline("sd1", 4, tmp_path)
    file = original_names.write(pipeline, tmp_path / "half.safetensors", dtype)
    pipeline.to(dtype).save_pretrained(tmp_path / "their")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = load_tensors(file / part), load_tensors(tmp_path / "their" / part)
        ours = {n if n in theirs else n.removeprefix("text_model."): tensor for n, tensor in ours.items()}
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == dtype for name in ours)


def test_an_autoencoder_alone_and_one_with_old_names_open_in_diffusers(tmp_path: Path) -> None:
    vae = their_pipeline("sd1", 5, tmp_path).vae
    vae.save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = load_file(weights)
    for ours, theirs in old.items():
        renamed = {name.replace(ours, theirs): tensor for name, tensor in renamed.items()}
    save_file(renamed, weights)
    run(tmp_path / "vae", tmp_path / "vae.safetensors", ConvertOptions())
    expected = original_names.vae(vae.state_dict(), len(vae.config.block_out_channels))
    found = load_file(tmp_path / "vae.safetensors")
    assert set(found) == set(expected)
    opened = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "vae.safetensors"), config=str(tmp_path / "vae"), local_files_only=True
    )
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in vae.state_dict().items())
