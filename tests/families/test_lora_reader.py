"""Files of adapters that are refused, by name; and updates of modules that a file has as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_cli.core.low_rank import LowRank
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.families.lora_file import write_lora
from ldm_cli.families.lora_reader import read_lora
from ldm_cli.formats.lora_names import Adaptable, ModuleNames
from ldm_cli.formats.lora_path import lora_name, lora_sha256
from ldm_cli.formats.single_file_names import to_file
from ldm_cli.formats.single_file_sd3 import transformer_table
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.storage import file_sha256
from tests.stages.published_xl import published_models
from tests.stages.tiny_sd3 import tiny_sd3

MODELS = {
    "unet": Adaptable(
        {"a.b.weight": torch.zeros(6, 4), "a.conv.weight": torch.zeros(6, 4, 3, 3), "a.norm.weight": torch.zeros(4)},
        {
            "block_out_channels": [8],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"],
        },
    )
}
LAYER = "text_model.encoder.layers.0.self_attn"


def saved(path: Path, **tensors: Tensor) -> Path:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return path


DOWN, UP = torch.ones(2, 4), torch.ones(6, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"lora_unet_a_c__lora_down__weight": DOWN, "lora_unet_a_c__lora_up__weight": UP},
            "no such module: lora_unet_a_c",
        ),
        ({"unet__a__norm__lora_A__weight": DOWN, "unet__a__norm__lora_B__weight": UP}, "no such module: unet.a.norm"),
        (
            {"unet__a__b__lora_A__weight": torch.ones(2, 5), "unet__a__b__lora_B__weight": UP},
            r"of another shape: unet.a.b is for \[6, 5\], not \[6, 4\]",
        ),
        ({"unet__a__b__lora_A__weight": DOWN}, "the tensors of unet.a.b are incomplete or of several kinds: down"),
        ({"lora_unet_a_b__lora_mid__weight": DOWN}, "of no supported kind of adapter: lora_unet_a_b.lora_mid.weight"),
        ({"lora_unet_a_b__oft_blocks": DOWN}, "of no supported kind of adapter: lora_unet_a_b.oft_blocks"),
        ({"lora_unet_a_b__diff": DOWN}, "of no supported kind of adapter: lora_unet_a_b.diff"),
        (
            {
                "unet__a__b__lora_A__weight": DOWN,
                "unet__a__b__lora_B__weight": UP,
                "unet__a__b__dora_scale": torch.ones(1, 4),
            },
            "the DoRA of unet.a.b has norms of columns",
        ),
        (
            {"unet__a__conv__lora_A__weight": torch.ones(2, 3, 3, 4), "unet__a__conv__lora_B__weight": UP},
            r"of another shape: unet.a.conv is for \[6, 3, 3, 4\], not \[6, 4, 3, 3\]",
        ),
        (
            {"unet__a__b__lora_A__weight": torch.ones(2, 2, 2, 1), "unet__a__b__lora_B__weight": UP},
            r"of another shape: unet.a.b is for \[6, 2, 2, 1\], not \[6, 4\]",
        ),
        (
            {"unet__a__b__lora_A__weight": torch.ones(2, 6), "unet__a__b__lora_B__weight": torch.ones(4, 2)},
            r"of another shape: unet.a.b is for \[4, 6\], not \[6, 4\]",
        ),
        ({"unet:0:up": UP, "unet:0:down": DOWN}, "no such module: unet:0"),
        ({"<s1>": DOWN}, "of no supported kind of adapter: <s1>"),
        ({"unet__a__b__lora_A__weight": DOWN / 0, "unet__a__b__lora_B__weight": UP}, "are not finite"),
    ],
)
def test_what_does_not_fit_is_named(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_lora(saved(tmp_path / "a.safetensors", **tensors), MODELS)


NORMS = torch.ones(6)
LORA = {"unet__a__b__lora_A__weight": DOWN, "unet__a__b__lora_B__weight": UP}
KOHYA = {"lora_unet_a_b__lora_down__weight": DOWN, "lora_unet_a_b__lora_up__weight": UP}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "it holds no tensors"),
        (LORA | {"unet__a__b__lora_B__weight": torch.ones(6, 3)}, "the tensors of unet.a.b do not fit each other"),
        (LORA | {"unet__a__b__alpha": torch.ones(3)}, "do not fit each other"),
        ({"unet__a__b__lora_A__weight": DOWN[:0], "unet__a__b__lora_B__weight": UP[:, :0]}, "do not fit each other"),
        ({name: tensor.long() for name, tensor in LORA.items()}, "do not fit each other"),
        ({name: tensor[0] for name, tensor in LORA.items()}, "do not fit each other"),
        ({"unet__a__b__lokr_w1": torch.ones(2), "unet__a__b__lokr_w2": torch.ones(3, 2)}, "do not fit each other"),
        (LORA | {"unet__a__b__hada_w1_a": UP.clone()}, "incomplete or of several kinds: hada_w1_a, down, up"),
        (LORA | {name: tensor.clone() for name, tensor in KOHYA.items()}, "it has two updates of a.b"),
        (LORA | {"unet__a__b__lora_down__weight": DOWN + 1}, r"'unet.a.b.lora_down.weight' is the second of its kind"),
        (
            LORA | {"unet__a__b__lora_magnitude_vector": NORMS, "unet__a__b__dora_scale": NORMS + 1},
            r"'unet.a.b.lora_magnitude_vector' is the second of its kind",
        ),
    ],
)
def test_tensors_that_make_no_update_are_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        read_lora(saved(tmp_path / "a.safetensors", **whole), MODELS)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{x", "lora_adapter_metadata is no JSON object"),
        ("[1]", "lora_adapter_metadata is no JSON object"),
        ('{"unet.lora_alpha": NaN}', "lora_alpha: input should be a finite number"),
        ('{"unet.r": 0}', "r: input should be greater than 0"),
        ('{"unet.alpha_pattern": {"(": 1}}', "valid regular expression"),
    ],
)
def test_a_configuration_of_peft_that_makes_no_sense_is_refused(metadata: str, message: str, tmp_path: Path) -> None:
    tensors = {name.replace("__", "."): tensor for name, tensor in LORA.items()}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path / "a.safetensors", MODELS)


def test_a_kernel_of_one_pixel_updates_a_matrix_and_a_matrix_a_kernel(tmp_path: Path) -> None:
    pairs = {"b": (DOWN[..., None, None], UP[..., None, None]), "conv": (torch.randn(2, 36), UP + 1)}
    tensors = {f"unet__a__{name}__lora_A__weight": down for name, (down, _) in pairs.items()}
    tensors |= {f"unet__a__{name}__lora_B__weight": up for name, (_, up) in pairs.items()}
    found = read_lora(saved(tmp_path / "a.safetensors", **tensors), MODELS)["unet"]
    for name, (down, up) in pairs.items():
        weight = MODELS["unet"].weight(f"a.{name}")
        expected = (up.flatten(1) @ down.flatten(1)).view_as(weight)
        torch.testing.assert_close(found[f"a.{name}"].applied(weight), expected)


def test_a_third_of_the_rows_goes_to_each_of_queries_keys_and_values(tmp_path: Path) -> None:
    """One module of a file for three of ours: exact, since its rows are theirs."""
    weights = {f"{LAYER}.{letter}_proj.weight": torch.zeros(4, 4) for letter in "qkv"}
    models = {"text_encoder_2": Adaptable(weights, {"num_hidden_layers": 1})}
    down, up = torch.randn(2, 4), torch.randn(12, 2)
    name = "lora_te2_transformer_resblocks_0_attn_in_proj"
    file = saved(tmp_path / "a.safetensors", **{f"{name}__lora_down__weight": down, f"{name}__lora_up__weight": up})
    found = read_lora(file, models)["text_encoder_2"]
    joined = torch.cat([found[f"{LAYER}.{letter}_proj"].delta() for letter in "qkv"])
    torch.testing.assert_close(joined, up @ down)
    norms = torch.rand(12)
    tensors = {f"{name}__lora_down__weight": down, f"{name}__lora_up__weight": up, f"{name}__dora_scale": norms}
    found = read_lora(saved(file, **tensors), models)["text_encoder_2"]
    joined = torch.cat([found[f"{LAYER}.{letter}_proj"].applied(torch.zeros(4, 4)) for letter in "qkv"])
    torch.testing.assert_close(joined.norm(dim=1), norms)


def test_numbers_count_downwards_upwards_and_through_the_middle_last(tmp_path: Path) -> None:
    blocks = ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0"]
    layers = [
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_out.0",
        "ff.net.0.proj",
    ]
    names = [f"{block}.transformer_blocks.0.{layer}.weight" for block in blocks for layer in layers]
    models = {
        "unet": Adaptable(dict.fromkeys(names, torch.zeros(6, 4)), MODELS["unet"].config),
        "text_encoder": Adaptable({f"{LAYER}.{letter}_proj.weight": torch.zeros(6, 4) for letter in "kqv"}, {}),
    }
    numbers = {"unet": (0, 3, 4, 5, 9, 18), "text_encoder": (0, 1, 2)}
    tensors = {
        f"{part}:{number}:{kind}": value + number
        for part, own in numbers.items()
        for number in own
        for kind, value in (("up", UP), ("down", DOWN))
    }
    found = read_lora(saved(tmp_path / "a.safetensors", **tensors), models)
    order = {part: {int(u.up[0, 0]) - 1: name for name, u in found[part].items()} for part in found}  # type: ignore[attr-defined]
    block = "attentions.0.transformer_blocks.0"
    assert order["unet"] == {
        0: f"down_blocks.0.{block}.attn1.to_q",
        3: f"down_blocks.0.{block}.attn1.to_out.0",
        4: f"down_blocks.0.{block}.ff.net.0.proj",
        5: f"down_blocks.0.{block}.attn2.to_q",
        9: f"up_blocks.1.{block}.attn1.to_q",
        18: f"mid_block.{block}.attn1.to_q",
    }
    assert order["text_encoder"] == {i: f"{LAYER}.{letter}_proj" for i, letter in enumerate("kvq")}


def test_every_number_of_a_public_file_of_lora_diffusion_means_one_module_of_stable_diffusion_1() -> None:
    """Its 144 of the U-Net are 9 in each of 16 blocks, its 48 of the text encoder 4 in each of 12 layers."""
    recipe = load_recipe("unet/sd15").recipe
    assert isinstance(recipe, TrainUnetRecipe)
    models = published_models()
    with torch.device("meta"):
        models["unet"] = UNet2DConditionModel(recipe.model)
    adaptable = {
        name: Adaptable(models[name].state_dict(), models[name].config.to_hugging_face())  # type: ignore[operator, union-attr]
        for name in ("unet", "text_encoder")
    }
    names = ModuleNames(adaptable)
    for part, count, last in (
        ("unet", 144, "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"),
        ("text_encoder", 48, "text_model.encoder.layers.11.self_attn.out_proj"),
    ):
        found = [names.targets(f"{part}:{number}") for number in range(count + 1)]
        assert {len(targets) for targets in found[:-1]} == {1}
        assert len({targets[0].module for targets in found[:-1]}) == count
        assert found[-2][0].module == last
        assert found[-1] == []


def test_kohyas_metadata_say_what_web_interfaces_ask_for(tmp_path: Path) -> None:
    file = tmp_path / "my-style.safetensors"
    write_lora(file, {"unet": {"a.b": LowRank(DOWN, UP, 1.0)}}, "kohya", {"ss_base_model_version": "sd_v1"})
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    payload = file.read_bytes()
    payload = payload[8 + int.from_bytes(payload[:8], "little") :]
    import hashlib

    assert metadata["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()
    assert {name: metadata[name] for name in ("ss_network_dim", "ss_network_alpha", "ss_output_name")} == {
        "ss_network_dim": "2",
        "ss_network_alpha": "1",
        "ss_output_name": "my-style",
    }
    assert metadata["ss_base_model_version"] == "sd_v1"


def test_folders_and_runs_hold_the_file_and_give_it_a_name(tmp_path: Path) -> None:
    adapters = {"unet": {"a.b": LowRank(DOWN, UP, 2.0)}}
    file = tmp_path / "run/model/pytorch_lora_weights.safetensors"
    write_lora(file, adapters, "diffusers", {})
    for path in (file, file.parent, tmp_path / "run"):
        assert lora_name(path) == "run"
        assert lora_sha256(path) == file_sha256(file)
        torch.testing.assert_close(read_lora(path, MODELS)["unet"]["a.b"].delta(), UP @ DOWN)
    with pytest.raises(InputNotFoundError, match="no such file, nor a folder with one"):
        read_lora(tmp_path, MODELS)
    for name in "xy":
        saved(tmp_path / f"{name}.safetensors", x=UP)
    with pytest.raises(InputNotFoundError, match=r"it holds x.safetensors, y.safetensors; give a .safetensors file"):
        read_lora(tmp_path, MODELS)


def test_pefts_configuration_counts_in_the_hash_and_other_types_are_refused(tmp_path: Path) -> None:
    name = "base_model__model__a__b"
    saved(tmp_path / "adapter_model.safetensors", **{f"{name}__lora_A__weight": DOWN, f"{name}__lora_B__weight": UP})
    config = tmp_path / "adapter_config.json"
    hashes = set()
    for alpha in (2, 4):
        config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
        torch.testing.assert_close(read_lora(tmp_path, MODELS)["unet"]["a.b"].delta(), alpha / 2 * UP @ DOWN)
        hashes.add(lora_sha256(tmp_path))
    assert len(hashes) == 2
    config.write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="adapters of PEFT's type IA3 are not supported"):
        read_lora(tmp_path, MODELS)


@pytest.mark.parametrize("dora", [False, True])
def test_a_transformers_adapters_in_kohyas_layout_name_the_modules_of_a_single_file(tmp_path: Path, dora: bool) -> None:
    """Queries, keys and values are one module there, and halves of the last modulations change places."""
    model = tiny_sd3(has_t5=False).denoiser
    table, generator = transformer_table(model.config.to_mapping()), torch.Generator().manual_seed(0)

    def update(weight: torch.Tensor) -> LowRank:
        up, down = (torch.randn(size, generator=generator) for size in ((len(weight), 2), (2, weight.shape[1])))
        return LowRank(down, up, 0.6, torch.rand(len(weight), generator=generator) if dora else None)

    weights = {name: t for name, t in model.state_dict().items() if name.endswith(".weight") and t.ndim == 2}
    updates = {name.removesuffix(".weight"): update(weight) for name, weight in weights.items()}
    file = tmp_path / "a.safetensors"
    write_lora(file, {"transformer": updates}, "kohya", {}, {"transformer": table})
    expected = to_file({f"{module}.weight": one.delta() for module, one in updates.items()}, table)
    tensors = load_file(file)
    names = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}" for name in expected}
    assert names == {name.partition(".")[0] for name in tensors}
    assert "lora_unet_joint_blocks_0_context_block_attn_qkv" in names
    for name, delta in expected.items():
        own = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        down, up, alpha = (tensors[f"{own}.{role}"] for role in ("lora_down.weight", "lora_up.weight", "alpha"))
        torch.testing.assert_close(alpha / len(down) * up @ down, delta)
    found = read_lora(file, {"transformer": Adaptable(model.state_dict(), model.config.to_mapping())})["transformer"]
    assert set(found) == set(updates)
    for module, one in updates.items():
        again = found[module]
        assert isinstance(again, LowRank)
        assert torch.equal(again.down, one.down)
        assert torch.equal(again.up, one.up)
        assert again.alpha == pytest.approx(one.alpha)
        assert again.magnitude is None if one.magnitude is None else torch.equal(again.magnitude, one.magnitude)


def test_queries_alone_become_a_block_beside_zeros(tmp_path: Path) -> None:
    model = tiny_sd3(has_t5=False).denoiser
    config, name = model.config.to_mapping(), "transformer_blocks.0.attn.to_q"
    one = LowRank(torch.randn(2, 16), torch.randn(16, 2), 2.0)
    file = tmp_path / "a.safetensors"
    write_lora(file, {"transformer": {name: one}}, "kohya", {}, {"transformer": transformer_table(config)})
    found = read_lora(file, {"transformer": Adaptable(model.state_dict(), config)})["transformer"]
    assert torch.equal(found[name].delta(), one.delta())
    assert not any(update.delta().any() for module, update in found.items() if module != name)
