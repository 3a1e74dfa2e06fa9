"""Image prompt adapters against diffusers: files read and written, tokens, attention, gradients, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.image_prompt import ImagePrompts
from ldm_cli.core.models.clip_config import CLIPVisionConfig
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_vision import CLIPVisionModelWithProjection
from ldm_cli.core.models.ip_adapter import ImageProjection, IPAdapter, Resampler, cross_attentions
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder
from ldm_cli.families.ip_adapter import read_ip_adapter, write_ip_adapter
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.pipeline_folder import IMAGE_ENCODER
from ldm_cli.pictures.images import read_image, save_image
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import sample
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.stages.support.picture_generator import Latents
from tests.parity.their_pipeline import scheduler, their_folder
from tests.parity.xl_pipeline import their_xl_folder
from tests.sampling.tiny import randomize

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 20,
}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Attention at each level, so that the middle precedes layers of the way up.
    levels = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    return their_folder(tmp_path_factory.mktemp("sd"), scheduler("ddim"), **levels)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return their_xl_folder(tmp_path_factory.mktemp("xl"), seed=3)


def published_tensors(unet: Any, kind: str, seed: int) -> dict[str, Tensor]:
    """A file of random weights for a U-Net of diffusers: names by its `attn_processors`, as in the published files."""
    generator = torch.Generator().manual_seed(seed)
    dim = unet.config.cross_attention_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / (shape[-1] if len(shape) > 1 else 4) ** 0.5

    tensors = {}
    for n, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            layer = unet.get_submodule(name.removesuffix(".processor"))
            for role in ("k", "v"):
                tensors[f"ip_adapter.{n}.to_{role}_ip.weight"] = random(layer.to_q.out_features, dim)
    if kind == "base":
        shapes: dict[str, tuple[int, ...]] = {
            "proj.weight": (4 * dim, VISION["projection_dim"]),
            "proj.bias": (4 * dim,),
        }
        shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    else:
        width, heads = 128, 2
        shapes = {"latents": (1, 6, width), "proj_in.weight": (width, VISION["hidden_size"]), "proj_in.bias": (width,)}
        shapes |= {"proj_out.weight": (dim, width), "proj_out.bias": (dim,)}
        shapes |= {"norm_out.weight": (dim,), "norm_out.bias": (dim,)}
        for i in range(4):
            for name in ("0.norm1", "0.norm2", "1.0"):
                shapes |= {f"layers.{i}.{name}.weight": (width,), f"layers.{i}.{name}.bias": (width,)}
            shapes |= {
                f"layers.{i}.0.to_q.weight": (64 * heads, width),
                f"layers.{i}.0.to_kv.weight": (128 * heads, width),
            }
            shapes |= {f"layers.{i}.0.to_out.weight": (width, 64 * heads)}
            shapes |= {f"layers.{i}.1.1.weight": (4 * width, width), f"layers.{i}.1.3.weight": (width, 4 * width)}
    return tensors | {f"image_proj.{name}": random(*shape) for name, shape in shapes.items()}


def publish(folder: Path, pipeline: Any, kind: str, seed: int = 0) -> Path:
    """A repository as published: an adapter and its image encoder; returns the file."""
    models = folder / "models"
    encoder = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION))
    randomize(encoder, 9).save_pretrained(models / "image_encoder")
    file = models / f"ip-adapter-{kind}-{seed}.safetensors"
    save_file(published_tensors(pipeline.unet, kind, seed), file)
    return file


def image_features(kind: str, rows: int = 2) -> Tensor:
    shape = (rows, VISION["projection_dim"]) if kind == "base" else (rows, 17, VISION["hidden_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def inputs(unet: Any) -> tuple[Tensor, Tensor, Condition, dict[str, Tensor]]:
    """Noisy latents, times, and the condition of both sides."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    tokens = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    condition, added = Condition(tokens=tokens), {}
    if unet.config.addition_embed_type == "text_time":
        sizes = torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        pooled = torch.randn(2, width, generator=generator)
        added = {"text_embeds": pooled, "time_ids": sizes}
        condition = Condition(tokens=tokens, pooled=torch.cat([pooled, sizes], dim=1))
    return x, torch.tensor([500.0, 20.0]), condition, added


def with_tokens(condition: Condition, *tokens: Tensor) -> Condition:
    return Condition(**condition.tensors, image_tokens=torch.cat(tokens, dim=1))


def load_theirs(folder: Path, files: list[Path]) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    names = [file.name for file in files]
    pipeline.load_ip_adapter(str(files[0].parent.parent), subfolder="models", weight_name=names)
    return pipeline


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("model", ["sd", "xl"])
def test_published_files_compute_what_diffusers_computes(
    model: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    file = publish(tmp_path, diffusers.DiffusionPipeline.from_pretrained(folder), kind)
    theirs = load_theirs(folder, [file])
    theirs.set_ip_adapter_scale(0.6)
    unet: Any = open_family(folder).denoiser  # type: ignore[attr-defined]
    x, t, condition, added = inputs(unet)
    adapter, features = read_ip_adapter(file, unet), image_features(kind)
    with torch.inference_mode():
        plain = unet(x, t, condition)
        ImagePrompts(unet, [(adapter, 0.6)])
        assert torch.equal(unet(x, t, condition), plain), "without image tokens nothing changes"
        output = unet(x, t, with_tokens(condition, adapter(features)))
        added |= {"image_embeds": [features[:, None]]}
        expected = theirs.unet(x, t, condition.tokens, added_cond_kwargs=added).sample
    assert (expected - plain).abs().max() > 0.05 * expected.std(), "the picture changes something"
    assert (output - expected).abs().max() <= TOLERANCE * expected.std()


def test_several_adapters_add_up_as_in_diffusers(sd: Path, tmp_path: Path) -> None:
    base = diffusers.DiffusionPipeline.from_pretrained(sd)
    files = [publish(tmp_path, base, kind, seed) for seed, kind in enumerate(["base", "plus", "base"])]
    theirs, scales = load_theirs(sd, files), [0.5, 0.0, -0.7]
    theirs.set_ip_adapter_scale(scales)
    unet: Any = open_family(sd).denoiser  # type: ignore[attr-defined]
    adapters = [read_ip_adapter(file, unet) for file in files]
    features = [image_features(kind) for kind in ("base", "plus", "base")]
    ImagePrompts(unet, list(zip(adapters, scales, strict=True)))
    x, t, condition, _ = inputs(unet)
    with torch.inference_mode():
        tokens = [adapter(image) for adapter, image in zip(adapters, features, strict=True)]
        output = unet(x, t, with_tokens(condition, *tokens))
        added = {"image_embeds": [image[:, None] for image in features]}
        expected = theirs.unet(x, t, condition.tokens, added_cond_kwargs=added).sample
    assert (output - expected).abs().max() <= TOLERANCE * expected.std()


def test_what_we_write_opens_in_diffusers(xl: Path, tmp_path: Path) -> None:
    unet: Any = open_family(xl).denoiser  # type: ignore[attr-defined]
    layers, dim = cross_attentions(unet), unet.config.cross_attention_dim
    encoder = CLIPImageEncoder(
        randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)), 9), CLIPImageProcessor.for_side(32)
    )
    encoder.save(tmp_path / "models", IMAGE_ENCODER)
    for kind, image_proj in (("base", ImageProjection(20, dim, 4)), ("plus", Resampler(32, dim, 16, 128, 2))):
        adapter = randomize(IPAdapter(image_proj, layers), 3)
        file = tmp_path / "models/ip_adapter.safetensors"
        write_ip_adapter(file, adapter.state_dict())
        theirs = load_theirs(xl, [file])
        features = image_features(kind)
        with torch.inference_mode():
            (expected,) = theirs.unet.encoder_hid_proj([features[:, None]])
            assert (adapter(features) - expected[:, 0]).abs().max() <= TOLERANCE
            pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
            embedding = encoder.model.project(encoder.model(pixels))
            assert (embedding - theirs.image_encoder(pixels).image_embeds).abs().max() <= TOLERANCE
        again = read_ip_adapter(file, unet).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in adapter.state_dict().items())


def picture(folder: Path, seed: int, size: tuple[int, int] = (32, 32)) -> Path:
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    save_image(folder / f"{seed}.png", pixels)
    return folder / f"{seed}.png"


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_pictures_are_those_of_diffusers(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    base, kinds = diffusers.DiffusionPipeline.from_pretrained(folder), ("base", "plus")
    files = [publish(tmp_path, base, kind, seed) for seed, kind in enumerate(kinds)]
    images = [picture(tmp_path, seed, size) for seed, size in enumerate([(32, 32), (48, 80)])]
    theirs, scales = load_theirs(folder, files), [0.7, 0.4]
    theirs.set_ip_adapter_scale(scales)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    result = theirs(
        "a blue square",
        negative_prompt="green",
        ip_adapter_image=[Image.open(image) for image in images],
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=noise,
        output_type="np",
    )
    expected = (torch.from_numpy(result.images[0]).permute(2, 0, 1) * 255).round()
    save_file({"latents": noise}, tmp_path / "latents.safetensors")
    prompts = [
        {"image": str(image), "scale": scale, "adapter": str(file)}
        for image, scale, file in zip(images, scales, files, strict=True)
    ]
    sampling = {"steps": 5, "guidance": 3.0, "negative": "green", "width": 16, "height": 16, "images_per_prompt": 1}
    recipe = {"command": "sample", "model": str(folder), "prompts": ["a blue square"], "sampling": sampling}
    found = []
    for name, given in (("with", prompts), ("without", [])):
        options = RunOptions(tmp_path / name, "cpu")
        latents = Latents(tmp_path / "latents.safetensors")
        fields = recipe | {"image_prompts": given}
        run = sample.run(SampleRecipe.from_mapping(fields), options, SilentReporter(), latents)
        found.append(read_image(Path(run["images"][0]["file"])).float())
    assert found[0].std() > 10, "flat pictures prove nothing"
    assert (found[0] - expected).abs().max() <= 2
    assert (found[1] - expected).abs().max() > 10, "the image prompts change something"


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_gradients_are_those_of_diffusers(kind: str, sd: Path, tmp_path: Path) -> None:
    """Autograd through the attention processors of diffusers, for all weights of the adapter."""
    file = publish(tmp_path, diffusers.DiffusionPipeline.from_pretrained(sd), kind)
    theirs = load_theirs(sd, [file]).unet
    unet: Any = open_family(sd).denoiser  # type: ignore[attr-defined]
    adapter = read_ip_adapter(file, unet).requires_grad_(True)
    ImagePrompts(unet, [(adapter, 1.0)])
    unet.enable_gradient_checkpointing()
    x, t, condition, _ = inputs(unet)
    features = image_features(kind)
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    (unet(x, t, with_tokens(condition, adapter(features))) - target).square().mean().backward()
    theirs.requires_grad_(True)
    output = theirs(x, t, condition.tokens, added_cond_kwargs={"image_embeds": [features[:, None]]}).sample
    (output - target).square().mean().backward()
    assert all(parameter.grad is None for parameter in unet.parameters())
    processors = [p for name, p in theirs.attn_processors.items() if name.endswith("attn2.processor")]
    for number, processor in enumerate(processors):
        own: Any = adapter.ip_adapter[str(2 * number + 1)]
        for mine, other in ((own.to_k_ip, processor.to_k_ip[0]), (own.to_v_ip, processor.to_v_ip[0])):
            assert_close(mine.weight.grad, other.weight.grad)
    projection: Any = theirs.encoder_hid_proj.image_projection_layers[0]
    own = adapter.image_proj
    if kind == "base":
        assert_close(own.proj.weight.grad, projection.image_embeds.weight.grad)
    else:
        assert_close(own.latents.grad, projection.latents.grad)
        kv = torch.cat([projection.layers[0].attn.to_k.weight.grad, projection.layers[0].attn.to_v.weight.grad])
        assert_close(own.layers[0][0].to_kv.weight.grad, kv)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-6
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
