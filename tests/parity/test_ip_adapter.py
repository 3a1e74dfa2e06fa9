"""Image prompt adapters against diffusers: files read and written, tokens, attention, gradients, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.image_prompt import ImagePrompts
from ldm_cli.core.models.clip_config import CLIPVisionConfig
from ldm_cli.core.models.clip_vision import CLIPVisionModelWithProjection
from ldm_cli.core.models.ip_adapter import ImageProjection, IPAdapter, Resampler, cross_attentions
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder
from ldm_cli.families.ip_adapter_file import read_ip_adapter, write_ip_adapter
from ldm_cli.families.open_family import open_family
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
        shapes: dict[str, tuple[int, ...]] = {"proj.weight": (4 * dim, VISION["projection_dim"]), "proj.bias": (4 * dim,)}
        shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    else:
        width, heads = 128, 2
        shapes = {"latents": (1, 6, width), "proj_in.weight": (width, VISION["hidden_size"]), "proj_in.bias": (width,)}
        shapes |= {"proj_out.weight": (dim, width), "proj_out.bias": (dim,)}
        shapes |= {"norm_out.weight": (dim,), "norm_out.bias": (dim,)}
        for i in range(4):
            for name in ("0.norm1", "0.norm2", "1.0"):
                shapes |= {f"layers.{i}.{name}.weight": (width,), f"layers.{i}.{name}.bias": (width,)}
            shapes |= {f"layers.{i}.0.to_q.weight": (64 * heads, width), f"layers.{i}.0.to_kv.weight": (128 * heads, width)}
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
