"""Single files: what is recognised, what is refused, and names that go both ways."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.families.clip_text_encoder import tokenizer_folder
from ldm_cli.formats.model_folder import load_model, without_weights
from ldm_cli.formats.model_source import load_tensors, read_model_json
from ldm_cli.formats.single_file import CONFIGS_KEY, SingleFile, as_single_file, single_file
from ldm_cli.formats.single_file_names import clip_table, from_file, text_table, to_file, unet_table, vae_table
from ldm_cli.formats.weight_files import read_tensors, release

UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
}
VAE = {"block_out_channels": (32,)}
TEXT = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
UNET_PREFIX, OLD_TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."


def filled(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Complete configuration and tensors that all differ."""
    config: Any = module.config
    content = config.to_hugging_face()
    if "architectures" in content:
        content["architectures"] = [type(module).__name__]
    generator = torch.Generator().manual_seed(0)
    return content, {n: torch.randn(t.shape, generator=generator) for n, t in module.state_dict().items()}


def pipeline(activation: str = "quick_gelu", layers: int = 1, **unet: Any) -> dict[str, Tensor]:
    """The tensors of a single file."""
    text = CLIPTextConfig(**TEXT | {"hidden_act": activation, "num_hidden_layers": layers})
    with without_weights():
        models = {
            "unet": UNet2DConditionModel(UNet2DConditionConfig(**UNET | unet)),
            "vae": AutoencoderKL(AutoencoderKLConfig(**VAE)),
            "text_encoder": CLIPTextModel(text),
        }
    return as_single_file({name: filled(model) for name, model in models.items()})


def opened(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, **options: Any) -> SingleFile:
    return single_file(tensors, metadata or {}, Path("x.safetensors"), **options)


def prediction(tensors: dict[str, Tensor], **metadata: str) -> str:
    found = opened(tensors, {name.replace("__", "."): value for name, value in metadata.items()})
    return str(found.json_files["scheduler/scheduler_config.json"]["prediction_type"])


def random_unet(choose: random.Random) -> UNet2DConditionConfig:
    levels = choose.choice([1, 2, 3])
    attended = [choose.random() < 0.5 for _ in range(levels)]
    return UNet2DConditionConfig(
        block_out_channels=tuple(4 * choose.choice([1, 2]) for _ in range(levels)),
        layers_per_block=choose.choice([1, 2, 3, tuple(choose.choice([1, 2]) for _ in range(levels))]),
        transformer_layers_per_block=choose.choice([1, 2]),
        down_block_types=tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if choose.random() < 0.5 else "UpBlock2D" for _ in range(levels)),
        attention_head_dim=2,
        cross_attention_dim=6,
        norm_num_groups=2,
        **choose.choice([{}, {"addition_embed_type": "text_time", "addition_time_embed_dim": 2,
                              "projection_class_embeddings_input_dim": 18}]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_names_go_into_a_file_and_back_for_every_shape(seed: int) -> None:
    choose = random.Random(seed)
    levels = choose.choice([1, 2, 3])
    vae = AutoencoderKLConfig(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=choose.choice([1, 2]),
        norm_num_groups=2,
        use_quant_conv=choose.choice([True, False]),
    )
    text = CLIPTextConfig(**TEXT | {"num_hidden_layers": choose.choice([1, 3])})
    clip = CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(hidden_size=24, num_hidden_layers=2))
    with without_weights():
        models = [
            (UNet2DConditionModel(random_unet(choose)), unet_table),
            (AutoencoderKL(vae), vae_table),
            (CLIPTextModelWithProjection(text), text_table),
            (CLIPModel(clip), clip_table),
        ]
    for model, table_of in models:
        config, tensors = filled(model)
        table = table_of(config)
        file = to_file(tensors, table)
        again = from_file(file, table)
        assert set(again) == set(tensors)
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)
        assert len({place.path for place in table.values()}) == len(set(table)) - 2 * sum(
            place.form == "key" for place in table.values()
        )


def test_what_single_files_have_no_name_for_is_named() -> None:
    with without_weights():
        unet = UNet2DConditionModel(UNet2DConditionConfig(**UNET, time_cond_proj_dim=8))
    with pytest.raises(CheckpointError, match=r"no name for the tensor time_embedding.cond_proj.weight of 'unet'"):
        as_single_file({"unet": filled(unet)})


def test_schedule_tables_and_averages_are_left_out_and_the_five_keys_name_each_model() -> None:
    tensors = pipeline()
    further = {"betas": torch.zeros(3), "model_ema.decay": torch.zeros(()), "first_stage_model.loss.x": torch.zeros(1)}
    found = opened(tensors | further)
    assert found.left_out == list(further)
    assert found.recognised_by == [
        f"{UNET_PREFIX}input_blocks.0.0.weight",
        "first_stage_model.encoder.conv_in.weight",
        f"{OLD_TEXT}embeddings.token_embedding.weight",
        f"{UNET_PREFIX}middle_block.1.proj_in.weight",
        "first_stage_model.encoder.down.0.block.0.conv1.weight",
    ]


def test_old_names_of_the_text_encoder_and_of_the_autoencoders_prefix_are_known(tmp_path: Path) -> None:
    tensors = pipeline()
    old = {n.replace(OLD_TEXT, "cond_stage_model.transformer."): t for n, t in tensors.items()}
    save_file({n.replace("first_stage_model.", "vae."): t for n, t in old.items()}, tmp_path / "old.safetensors")
    save_file(tensors, tmp_path / "new.safetensors")
    for part, kind in (("text_encoder", CLIPTextModel), ("vae", AutoencoderKL)):
        states = [
            load_model(kind, tmp_path / file / part).state_dict() for file in ("old.safetensors", "new.safetensors")
        ]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_stable_diffusion_2_keeps_23_of_24_layers_and_no_projection() -> None:
    tensors = pipeline("gelu", layers=24, use_linear_projection=True, attention_head_dim=(1, 1))
    further = {
        "cond_stage_model.model.text_projection": torch.zeros(64, 8),
        "cond_stage_model.model.logit_scale": torch.zeros(()),
    }
    found = opened(tensors | further)
    assert found.json_files["text_encoder/config.json"]["num_hidden_layers"] == 23
    assert len(found.left_out) == 12 + 2
    assert not any("layers.23" in name for name in found.parts["text_encoder"].as_in_folder())


@pytest.mark.parametrize(("width", "activation"), [(64, "quick_gelu"), (1280, "gelu")])
def test_a_text_tower_with_names_of_transformers_may_have_a_projection(width: int, activation: str) -> None:
    config = CLIPTextConfig(**TEXT | {"hidden_size": width, "hidden_act": activation}, projection_dim=24)
    with without_weights():
        content, tensors = filled(CLIPTextModelWithProjection(config))
    found = opened(tensors).parts[""]
    assert found.as_in_folder().keys() == tensors.keys()
    told = ("architectures", "projection_dim", "hidden_act")
    assert [found.config[name] for name in told] == [content[name] for name in told]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_second_tower_of_xl_has_its_place_whatever_its_activation(activation: str) -> None:
    text = CLIPTextConfig(**TEXT | {"hidden_act": activation})
    with without_weights():
        towers = {"text_encoder": CLIPTextModel(text), "text_encoder_2": CLIPTextModelWithProjection(text)}
    names = as_single_file({name: filled(tower) for name, tower in towers.items()})
    places = [name.split(".")[:3] for name in names]
    assert {tuple(place) for place in places} == {("conditioner", "embedders", "0"), ("conditioner", "embedders", "1")}
    assert places.count(["conditioner", "embedders", "0"]) == len(towers["text_encoder"].state_dict())


def test_prediction_type_is_what_the_file_says_else_as_diffusers_decides() -> None:
    first, second = pipeline(), pipeline("gelu", use_linear_projection=True, attention_head_dim=(1, 1))
    inpainting = pipeline("gelu", use_linear_projection=True, attention_head_dim=(1, 1), in_channels=9)
    assert prediction(first) == "epsilon"
    assert prediction(second) == "v_prediction"
    assert prediction(inpainting) == "epsilon"
    assert prediction(second, global_step="875000") == "epsilon"
    assert prediction(first, modelspec__prediction_type="v") == "v_prediction"
    assert prediction(second, modelspec__prediction_type="epsilon") == "epsilon"
    assert prediction(first | {"v_pred": torch.zeros(0)}) == "v_prediction"
    marked = opened(first | {"ztsnr": torch.zeros(0)}).json_files["scheduler/scheduler_config.json"]
    assert (marked["rescale_betas_zero_snr"], marked["timestep_spacing"]) == (True, "trailing")
    assert opened(second).json_files["unet/config.json"]["sample_size"] == 96


def test_configurations_of_the_metadata_have_precedence_over_shapes_and_given_ones_over_both() -> None:
    tensors = pipeline()
    content = opened(tensors).json_files["unet/config.json"]
    metadata = {CONFIGS_KEY: json.dumps({"unet/config.json": {**content, "attention_head_dim": 4}})}
    given = {"unet/config.json": {**content, "attention_head_dim": 2}, "unknown.json": {}}
    assert content["attention_head_dim"] == 8
    assert opened(tensors, metadata).parts["unet"].config["attention_head_dim"] == 4
    found = opened(tensors, metadata, configs=given)
    assert found.parts["unet"].config["attention_head_dim"] == 2
    assert "unknown.json" not in found.json_files


def test_averages_of_the_unet_are_taken_where_asked_for() -> None:
    tensors = pipeline()
    flat = {
        "model_ema." + n.removeprefix("model.").replace(".", ""): t + 1 for n, t in tensors.items() if UNET_PREFIX in n
    }
    plain, averaged = opened(tensors | flat), opened(tensors | flat, ema=True)
    for before, after in ((plain, averaged),):
        ours, theirs = before.parts["unet"].as_in_folder(), after.parts["unet"].as_in_folder()
        assert all(torch.equal(ours[name] + 1, theirs[name]) for name in ours)
        assert all(torch.equal(t, after.parts["vae"].tensors[n]) for n, t in before.parts["vae"].tensors.items())
    with pytest.raises(CheckpointError, match=r"no averaged weights.*model_ema.diffusion_modelinput_blocks00weight"):
        opened(tensors, ema=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["double_blocks.0.x"], "names are those of FLUX: double_blocks.0.x"),
        (["lora_unet_down.lora_up.weight"], "names are those of a LoRA"),
        (["down_blocks.0.resnets.0.conv1.weight"], "those of diffusers, which are read as a folder"),
        (list("abcdefg"), "cannot tell the architecture of 'x.safetensors': it holds a, b, c, d, e and 2 more"),
        ([], "it holds nothing"),
    ],
)
def test_other_architectures_are_refused_with_the_keys_that_told(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened({name: torch.zeros(1) for name in names})
    assert message in str(caught.value)


def test_a_tensor_of_no_model_and_a_missing_one_are_named(tmp_path: Path) -> None:
    tensors = pipeline()
    with pytest.raises(CheckpointError, match=r"text_encoder, and tensors that belong to none of these: text.x"):
        opened(tensors | {"text.x": torch.zeros(1)})
    save_file(tensors | {f"{UNET_PREFIX}input_blocks.1.0.extra": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x.safetensors/unet' do not fit: unexpected: input_blocks.1.0.extra"):
        load_model(UNet2DConditionModel, tmp_path / "x.safetensors" / "unet")
    del tensors[f"{UNET_PREFIX}input_blocks.1.0.in_layers.0.weight"]
    save_file(tensors, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: down_blocks.0.resnets.0.norm1.weight"):
        load_model(UNet2DConditionModel, tmp_path / "y.safetensors" / "unet")
    del tensors[f"{UNET_PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    with pytest.raises(CheckpointError, match=r"the tensor 'middle_block.1.*attn2.to_k.weight' is missing"):
        opened(tensors)


def test_a_path_leads_into_a_file_as_into_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(pipeline(), file)
    assert read_model_json(file / "vae" / "config.json")["_class_name"] == "AutoencoderKL"
    assert set(load_tensors(file / "vae")) == set(AutoencoderKL(AutoencoderKLConfig(**VAE)).state_dict())
    with pytest.raises(InputNotFoundError, match=r"config.json' not found: the file holds unet, vae, text_encoder"):
        read_model_json(file / "config.json")
    with pytest.raises(CheckpointError, match="as one model: the file holds unet, vae, text_encoder; write"):
        load_tensors(file)
    with pytest.raises(InputNotFoundError, match=r"no tokenizer for .*x.safetensors.*--tokenizer DIR"):
        tokenizer_folder(file / "text_encoder")
    for place in (tmp_path / "tokenizer", tmp_path / "x" / "tokenizer"):
        place.mkdir(parents=True)
        assert tokenizer_folder(file / "text_encoder") == place
    vae = {n: t for n, t in pipeline().items() if n.startswith("first_stage_model.")}
    save_file(vae, file)  # another file of the same name
    assert load_model(AutoencoderKL, file).config.block_out_channels == (32,)


def test_weights_are_loaded_in_the_type_that_is_asked_for_and_the_files_pages_given_back(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({name: tensor.half() for name, tensor in pipeline().items()}, file)
    halves, model = load_tensors(file / "unet"), load_model(UNet2DConditionModel, file / "unet", dtype=torch.bfloat16)
    assert all(torch.equal(tensor, halves[name].bfloat16()) for name, tensor in model.state_dict().items())
    save_file({"a": torch.arange(100_000.0)}, file)
    mapped = read_tensors(file)["a"]
    assert mapped.sum() == torch.arange(100_000.0).sum()
    release(mapped)
    assert torch.equal(mapped, torch.arange(100_000.0))
