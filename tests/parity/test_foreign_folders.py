"""Folders of models as other programs leave them: read as diffusers and transformers read them, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.core.models.clip_config import CLIPConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.errors import CheckpointError, InputNotFoundError, LdmError
from ldm_cli.formats.model_folder import load_model, read_config
from ldm_cli.formats.model_source import weights_sha256

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
training_utils = pytest.importorskip("diffusers.training_utils")

WHOLE = "diffusion_pytorch_model.safetensors"
UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "projection_dim": 8,
}
VISION = {**{k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")}, "image_size": 8}


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def assert_read_as_diffusers(folder: Path, source: Path | None = None, **their_options: Any) -> None:
    ours = load_model(AutoencoderKL, folder).state_dict()
    theirs = diffusers.AutoencoderKL.from_pretrained(source or folder, **their_options).float().state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"attention_head_dim": [2, 4], "num_class_embeds": None, "sample_size": [8, 16]},
        {"cross_attention_dim": [12, 12], "transformer_layers_per_block": [1, 1], "layers_per_block": [1, 1]},
        {"only_cross_attention": [False, False], "mid_block_only_cross_attention": None},
        {"center_input_sample": None, "dual_cross_attention": None, "class_embeddings_concat": None},
        {"upcast_attention": None, "resnet_skip_time_act": None, "resnet_out_scale_factor": None},
        {"attention_type": None, "addition_embed_type_num_heads": None, "use_linear_projection": None},
        {"act_fn": "swish", "num_attention_heads": None, "time_embedding_dim": None, "sample_size": None},
    ],
)
def test_null_and_lists_in_a_unet_config_are_read_as_diffusers_reads_them(
    values: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(**UNET | values).save_pretrained(tmp_path)
    change(tmp_path, **values)
    ours = load_model(UNet2DConditionModel, tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 12)
    with torch.no_grad():
        found = ours(sample, torch.tensor([5.0]), Condition(tokens=text))
        assert torch.allclose(found, theirs(sample, 5, text).sample, atol=1e-5)


def test_what_ema_saves_is_read(tmp_path: Path) -> None:
    model = diffusers.UNet2DConditionModel(**UNET)
    ema = training_utils.EMAModel(
        model.parameters(), use_ema_warmup=True, model_cls=type(model), model_config=model.config
    )
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optimization_step"] == 1
    ours, theirs = load_model(UNet2DConditionModel, tmp_path), diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    "values",
    [
        {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        {"use_quant_conv": None, "use_post_quant_conv": None},
        {"act_fn": "swish", "sample_size": [32, 64], "force_upcast": None},
        {"mid_block_add_attention": None, "shift_factor": None},
    ],
)
def test_null_and_lists_in_an_autoencoder_config_are_read_as_diffusers_reads_them(
    values: dict[str, Any], vae: Path
) -> None:
    shutil.rmtree(vae)
    diffusers.AutoencoderKL(**{"block_out_channels": (8,), "norm_num_groups": 4} | values).save_pretrained(vae)
    change(vae, **values)
    assert_read_as_diffusers(vae)


def write_shards(folder: Path, tensors: dict[str, Tensor], index: str, infix: str = "") -> None:
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model{infix}-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index_beside_other_weights(folder: Path) -> dict[str, Any]:
    other = {name: tensor + 1 for name, tensor in load_file(folder / WHOLE).items()}
    write_shards(folder, other, f"{WHOLE}.index.json")
    return {}


def fp16_index(spelling: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        tensors = {name: tensor.half() for name, tensor in load_file(folder / WHOLE).items()}
        (folder / WHOLE).unlink()
        write_shards(folder, tensors, spelling, ".fp16")
        return {"variant": "fp16"}

    return write


def same_tensor_in_two_shards(folder: Path) -> dict[str, Any]:
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    write_shards(folder, tensors, f"{WHOLE}.index.json")
    second = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    save_file(load_file(second) | {name: tensor + 1 for name, tensor in tensors.items()}, second)
    return {}


def small_shards(folder: Path) -> dict[str, Any]:
    model = diffusers.AutoencoderKL.from_pretrained(folder)
    (folder / WHOLE).unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    return {}


@pytest.mark.parametrize(
    "arrange",
    [
        index_beside_other_weights,
        fp16_index("diffusion_pytorch_model.safetensors.index.fp16.json"),
        fp16_index("diffusion_pytorch_model.safetensors.fp16.index.json"),
        same_tensor_in_two_shards,
        small_shards,
    ],
)
def test_weights_in_several_files_are_read_as_diffusers_reads_them(
    arrange: Callable[[Path], dict[str, Any]], vae: Path
) -> None:
    assert_read_as_diffusers(vae, **arrange(vae))


def test_an_index_named_after_the_variant_is_read(vae: Path) -> None:
    expected = {name: tensor.half().float() for name, tensor in load_file(vae / WHOLE).items()}
    fp16_index("diffusion_pytorch_model.fp16.safetensors.index.json")(vae)
    ours = load_model(AutoencoderKL, vae).state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_transformers_prefers_the_whole_file_to_its_index_and_so_do_we(tmp_path: Path) -> None:
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).save_pretrained(tmp_path)
    other = {name: tensor + 1 for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(other, tmp_path / "model-00001-of-00001.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(other, "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path).state_dict()
    ours = load_model(CLIPTextModel, tmp_path).state_dict()
    assert all(torch.equal(ours[f"text_model.{k.removeprefix('text_model.')}"], v) for k, v in theirs.items())


def as_hub_cache(folder: Path, root: Path, refs: dict[str, str]) -> Path:
    """The folder as huggingface_hub keeps it: blobs, branches, and the snapshot of symbolic links that is returned."""
    snapshot = root / "snapshots" / "abc123"
    for file in folder.rglob("*"):
        if file.is_file():
            (blob := root / "blobs" / f"{file.name}-etag").parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, blob)
            (link := snapshot / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    (root / "refs").mkdir()
    for name, commit in refs.items():
        (root / "refs" / name).write_text(commit)
    return snapshot


@pytest.mark.parametrize("refs", [{"main": "abc123"}, {"main": "abc123\n", "v2": "def"}, {"v2": "abc123"}, {}])
def test_the_root_of_a_cached_model_is_its_snapshot(refs: dict[str, str], vae: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    snapshot = as_hub_cache(vae, root, refs)
    assert_read_as_diffusers(root, snapshot)
    assert_read_as_diffusers(snapshot)
    assert weights_sha256(root) == weights_sha256(snapshot)


@pytest.mark.parametrize("commit", ["gone", "../..", ""])
def test_a_snapshot_that_was_not_downloaded_is_named(commit: str, vae: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    as_hub_cache(vae, root, {"main": commit})
    with pytest.raises(InputNotFoundError, match=r"no snapshot to use in '.*models--org--name': refs/main names"):
        load_model(AutoencoderKL, root)


@pytest.mark.parametrize("variant", ["non_ema", "fp32", "ema"])
def test_weights_of_another_variant_are_named_where_there_are_no_others(variant: str, vae: Path) -> None:
    name = f"diffusion_pytorch_model.{variant}.safetensors"
    (vae / WHOLE).rename(vae / name)
    with pytest.raises(InputNotFoundError, match=f"it holds {name}: rename"):
        load_model(AutoencoderKL, vae)


@pytest.mark.parametrize("name", ["x.safetensors", "model.ckpt", "config.json"])
@pytest.mark.parametrize("read", [read_config, lambda f: load_model(AutoencoderKL, f)])
def test_a_file_that_is_no_checkpoint_is_refused(read: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"cannot read '.*{name}': damaged safetensors"):
        read(tmp_path / name)


FLOATS = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float16,
    torch.bfloat16,
    torch.float64,
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("part", ["all", "some"])
def test_every_type_of_floating_point_numbers_is_read_as_diffusers_reads_it(
    dtype: torch.dtype, part: str, vae: Path
) -> None:
    tensors = load_file(vae / WHOLE)
    save_file({n: t.to(dtype) if part == "all" or "conv" in n else t for n, t in tensors.items()}, vae / WHOLE)
    assert_read_as_diffusers(vae, low_cpu_mem_usage=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.uint16, torch.complex64])
def test_a_type_that_holds_no_weights_is_refused_by_name(dtype: torch.dtype, vae: Path) -> None:
    tensors = load_file(vae / WHOLE)
    save_file(tensors | {"quant_conv.weight": tensors["quant_conv.weight"].to(dtype)}, vae / WHOLE)
    with pytest.raises(CheckpointError, match=f"unsupported type: quant_conv.weight is {str(dtype)[6:]}"):
        load_model(AutoencoderKL, vae)


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F8_E8M0", 8), ("F6_E2M3", 6), ("F9", 8)])
def test_a_type_that_torch_cannot_convert_is_refused_by_name(dtype: str, bits: int, vae: Path) -> None:
    """Written by hand: safetensors does not write them all."""
    header, data, start = {}, b"", 0
    for name, tensor in load_file(vae / WHOLE).items():
        kind = dtype if name == "quant_conv.weight" else "F32"
        size = tensor.numel() * (bits if kind == dtype else 32) // 8
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, start + size]}
        data, start = data + bytes(size), start + size
    text = json.dumps(header).encode()
    (vae / WHOLE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(CheckpointError, match=f"(?i){dtype.removeprefix('F8_')}"):
        load_model(AutoencoderKL, vae)


@pytest.mark.parametrize("scale", ["{0}.scale_weight", "{0}.weight_scale", "{0}.weight_scale_inv", "{0}.input_scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_with_scales_is_refused_also_where_more_tensors_than_needed_are_read(
    dtype: torch.dtype, scale: str, tmp_path: Path
) -> None:
    vision = transformers.CLIPVisionConfig(**VISION, patch_size=4).to_dict()
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "text_model.encoder.layers.0.mlp.fc1"
    eighth = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    parse = lambda mapping: CLIPConfig.from_hugging_face(mapping).text_config  # noqa: E731
    save_file(eighth, tmp_path / "model.safetensors")
    whole = load_model(CLIPTextModel, tmp_path, parse, allow_extra=True)
    assert torch.equal(whole.state_dict()[f"{layer}.weight"], tensors[f"{layer}.weight"].to(dtype).float())
    save_file(eighth | {scale.format(layer): torch.tensor(2.0)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"float8 weights with scales are not supported: {scale.format(layer)}"):
        load_model(CLIPTextModel, tmp_path, parse, allow_extra=True)


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(1.0), torch.zeros(0), torch.zeros(8, 0, 1, 1), torch.full((8, 8, 1, 1), 1e300, dtype=torch.float64)],
    ids=["no dimension", "empty", "an empty dimension", "beyond float32"],
)
def test_tensors_that_cannot_be_weights_are_refused_by_name(tensor: Tensor, vae: Path) -> None:
    tensors = load_file(vae / WHOLE)
    save_file(tensors | {"quant_conv.weight": tensor}, vae / WHOLE)
    with pytest.raises(LdmError, match=r"quant_conv\.weight") as caught:
        load_model(AutoencoderKL, vae)
    assert caught.value.code == 83


def test_the_same_name_twice_in_a_header_is_refused_or_the_same_tensor(tmp_path: Path) -> None:
    for offsets in ([0, 4], [4, 8]):
        entries = [f'"a":{{"dtype":"F32","shape":[1],"data_offsets":{o}}}' for o in ([0, 4], offsets)]
        text = ("{" + ",".join(entries) + "}").encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(offsets[1]))
        (tmp_path / "config.json").write_text(json.dumps({"block_out_channels": [32]}))
        with pytest.raises(CheckpointError):
            load_model(AutoencoderKL, tmp_path)
