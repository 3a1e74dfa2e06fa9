"""Files of adapters against diffusers and PEFT: each layout read, each module kind, and what we write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_cli.core.low_rank import LowRank
from ldm_cli.families.adapted import AdaptedNetworks, adaptable_models, adaptable_networks
from ldm_cli.families.lora_file import write_lora
from ldm_cli.families.lora_reader import read_lora
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.lora_names import Adaptable
from ldm_cli.formats.single_file_names import Place, to_file, unet_table
from tests.parity.test_ip_adapter import inputs
from tests.parity.their_pipeline import scheduler, their_folder
from tests.parity.xl_pipeline import their_xl_folder

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

# PEFT warns of names that diffusers itself has left behind.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")

Update = dict[str, dict[str, LowRank]]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return their_folder(tmp_path_factory.mktemp("sd"), scheduler("ddim"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return their_xl_folder(tmp_path_factory.mktemp("xl"))


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of every linear layer and convolution, by the module's path."""
    found = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, found)}


def without_sizes(updates: Update) -> Update:
    """Without the embedding of sizes, which diffusers does not know in kohya's files."""
    return {part: {n: u for n, u in own.items() if not n.startswith("add_embedding")} for part, own in updates.items()}


def random_updates(
    models: Mapping[str, torch.nn.Module], seed: int = 0, dora: bool = False, one_alpha: bool = False
) -> Update:
    """Of every module, ranks 1 to 4, alphas that are not the rank; diffusers loses kohya's unless they are all one."""
    generator = torch.Generator().manual_seed(seed)
    updates: Update = {}
    for component, model in models.items():
        for i, (name, weight) in enumerate(weights_of(model).items()):
            rank, kernel = 1 + i % 4, weight.shape[2:]
            down = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
            up = torch.randn(len(weight), rank, *[1] * len(kernel), generator=generator) / 4
            norms = weight.detach().flatten(1).norm(dim=1)
            magnitude = norms * (1 + torch.rand(len(norms), generator=generator)) if dora else None
            updates.setdefault(component, {})[name] = LowRank(down, up, 2.0 if one_alpha else 1.0 + i % 3, magnitude)
    return updates


def ours(folder: Path, files: Mapping[Path, float]) -> dict[str, torch.nn.Module]:
    """Our networks with some files of adapters."""
    networks = adaptable_networks(open_family(folder))
    models = adaptable_models(networks)
    adapted = AdaptedNetworks(networks, {str(path): read_lora(path, models) for path in files})
    adapted.use({str(path): scale for path, scale in files.items()})
    return networks


def theirs(folder: Path, load: Callable[[Any], None]) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    load(pipeline)
    return pipeline


def apart(networks: Mapping[str, torch.nn.Module], pipeline: Any) -> dict[str, float]:
    """The largest difference of each network's output, over the outputs' deviation."""
    found = {}
    for component, network in networks.items():
        their = getattr(pipeline, component)
        if component == "unet":
            found[component] = _apart(*_unet_outputs(network, their))
        else:
            ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(1))
            with torch.inference_mode():
                states = their(ids).last_hidden_state if component == "text_encoder" else their(ids)[1]
                output = network(ids).last_hidden_state
            found[component] = _apart(output, states)
    return found


def _unet_outputs(network: Any, their: Any) -> tuple[Tensor, Tensor]:
    x, t, condition, added = inputs(their)
    with torch.inference_mode():
        expected = their(x, t, condition.tokens, added_cond_kwargs=added or None).sample
        return network(x, t, condition), expected


def _apart(output: Tensor, expected: Tensor) -> float:
    assert expected.std() > 1e-3, "flat outputs prove nothing"
    return float((output - expected).abs().max() / expected.std())


def base_models(folder: Path) -> dict[str, torch.nn.Module]:
    return adaptable_networks(open_family(folder))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("kind", "dora"),
    [
        ("sd", True),
        ("xl", False),
        pytest.param("sd", False, marks=pytest.mark.exhaustive),
        pytest.param("xl", True, marks=pytest.mark.exhaustive),
    ],
)
def test_a_file_that_we_write_opens_in_diffusers_and_here(
    kind: str, layout: Any, dora: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    base = base_models(folder)
    written = random_updates(base, dora=dora, one_alpha=layout == "kohya")
    written = without_sizes(written) if layout == "kohya" else written
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", written, layout, {})
    networks = ours(folder, {tmp_path: 1.0})
    if not (dora and layout == "kohya"):  # whose magnitudes diffusers drops
        pipeline = theirs(folder, lambda pipeline: pipeline.load_lora_weights(tmp_path))
        assert max(apart(networks, pipeline).values()) <= TOLERANCE
    for component, updates in written.items():
        for name, update in updates.items():
            merged = update.applied(weights_of(base[component])[name])
            torch.testing.assert_close(weights_of(networks[component])[name], merged, atol=1e-5, rtol=0)


def renamed(file: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(file)
    names = [change(name) for name in tensors]
    assert len(set(names)) == len(names)
    assert names != list(tensors)
    save_file(dict(zip(names, tensors.values(), strict=True)), file)


def old_name(name: str) -> str:
    """As diffusers before 0.22 wrote it."""
    infix = "lora" if name.startswith("unet") else "lora_linear_layer"
    return name.replace("lora_A", f"{infix}.down").replace("lora_B", f"{infix}.up")


def processor_name(name: str) -> str:
    """As diffusers before 0.15 wrote the U-Net's attention."""
    module, _, rest = name.removeprefix("unet.").partition(".lora_")
    kind = "down" if rest[0] == "A" else "up"
    path, _, layer = module.removesuffix(".0").rpartition(".")
    return f"unet.{path}.processor.{layer}_lora.{kind}.weight"


def attention(models: Mapping[str, torch.nn.Module], **given: Any) -> Update:
    """Of the U-Net's attention alone."""
    updates = random_updates({"unet": models["unet"]}, **given)["unet"]
    return {"unet": {name: update for name, update in updates.items() if ".attn" in name}}


@pytest.mark.parametrize(("kind", "change"), [("sd", old_name), ("xl", old_name), ("sd", processor_name)])
def test_old_layouts_of_diffusers_are_read_as_diffusers_reads_them(
    kind: str, change: Callable[[str], str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, file = request.getfixturevalue(kind), tmp_path / "pytorch_lora_weights.safetensors"
    base = base_models(folder)
    updates = random_updates(base) if change is old_name else attention(base)
    write_lora(file, updates, "diffusers", {})
    renamed(file, change)
    pipeline = theirs(folder, lambda pipeline: pipeline.load_lora_weights(tmp_path))
    assert max(apart(ours(folder, {file: 1.0}), pipeline).values()) <= TOLERANCE


def single_file_name(config: Mapping[str, Any]) -> Callable[[str], str]:
    """kohya's names of the U-Net by the paths of a single file."""
    table: dict[str, Place] = unet_table(config)

    def change(name: str) -> str:
        module, dot, rest = name.partition(".")
        path = paths[module.removeprefix("lora_unet_")]
        (theirs,) = to_file({f"{path}.weight": torch.zeros(1, 1)}, table)
        return "lora_unet_" + theirs.removesuffix(".weight").replace(".", "_") + dot + rest

    model = diffusers.UNet2DConditionModel.from_config(dict(config))
    paths = {name.replace(".", "_"): name for name in weights_of(model)}
    return change


def test_names_of_single_files_are_read_as_diffusers_reads_them(xl: Path, tmp_path: Path) -> None:
    """diffusers maps the blocks alone, and of them the attention."""
    file, base = tmp_path / "a.safetensors", base_models(xl)
    write_lora(file, attention(base, one_alpha=True), "kohya", {})
    config = json.loads((xl / "unet/config.json").read_text())
    renamed(file, single_file_name(config))
    assert any(
        name.startswith("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q") for name in load_file(file)
    )
    pipeline = theirs(xl, lambda pipeline: pipeline.load_lora_weights(file))
    assert apart({"unet": ours(xl, {file: 1.0})["unet"]}, pipeline)["unet"] <= TOLERANCE


def test_every_name_of_a_single_file_means_the_module_of_its_own_name(sd: Path, tmp_path: Path) -> None:
    base = {"unet": base_models(sd)["unet"]}
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        write_lora(file, random_updates(base), "kohya", {})
    renamed(files[1], single_file_name(json.loads((sd / "unet/config.json").read_text())))
    states = [ours(sd, {file: 1.0})["unet"].state_dict() for file in files]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_three_at_once_with_weights_are_those_of_diffusers(xl: Path, tmp_path: Path) -> None:
    scales, base = {"a": 0.7, "b": -0.4, "c": 1.3}, base_models(xl)
    for seed, (name, layout) in enumerate(zip(scales, ["diffusers", "kohya", "diffusers"], strict=True)):
        write_lora(
            tmp_path / f"{name}.safetensors", without_sizes(random_updates(base, seed, one_alpha=True)), layout, {}
        )  # type: ignore[arg-type]

    def load(pipeline: Any) -> None:
        for name in scales:
            pipeline.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
        pipeline.set_adapters(list(scales), list(scales.values()))

    networks = ours(xl, {tmp_path / f"{name}.safetensors": scale for name, scale in scales.items()})
    assert max(apart(networks, theirs(xl, load)).values()) <= 2 * TOLERANCE


PEFT = {
    "lora": lambda: peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["to_q", "to_k", "conv1", "time_emb_proj", "proj_in"],
        rank_pattern={"to_k": 2, "down_blocks.0.resnets.0.conv1": 4},
        alpha_pattern={"attn1.to_q": 1},
    ),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["to_v", "conv2"]),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["to_v", "conv2", "proj_out"]),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["to_q", "conv1", "proj_in"]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=["to_q", "conv1", "proj_in", "ff.net.2"]),
    "lokr both": lambda: peft.LoKrConfig(r=2, alpha=3, decompose_both=True, target_modules=["to_q", "conv1"]),
    "lokr whole": lambda: peft.LoKrConfig(r=40, alpha=20, target_modules=["to_q", "conv1"]),
}


def trained(model: Any) -> Any:
    """With random numbers in what begins at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
            elif any(word in name for word in ("lora_", "hada_", "lokr_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model.eval()


@pytest.mark.parametrize("kind", PEFT)
def test_a_folder_of_peft_gives_the_outputs_of_peft(kind: str, sd: Path, tmp_path: Path) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd / "unet")
    adapted = trained(peft.get_peft_model(unet, PEFT[kind]()))
    adapted.save_pretrained(tmp_path)
    networks = ours(sd, {tmp_path: 1.0})
    assert _apart(*_unet_outputs(networks["unet"], adapted)) <= TOLERANCE


def test_alphas_in_the_metadata_of_diffusers_are_read(sd: Path, tmp_path: Path) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(sd)
    pipeline.unet.add_adapter(PEFT["lora"]())
    trained(pipeline.unet)
    layers = peft.get_peft_model_state_dict(pipeline.unet)
    metadata = pipeline.unet.peft_config["default"].to_dict()
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    assert apart({"unet": ours(sd, {tmp_path: 1.0})["unet"]}, pipeline)["unet"] <= TOLERANCE


def test_a_file_that_we_write_opens_in_peft(sd: Path, tmp_path: Path) -> None:
    unet, file = diffusers.UNet2DConditionModel.from_pretrained(sd / "unet"), tmp_path / "a.safetensors"
    written = attention(base_models(sd))
    write_lora(file, written, "diffusers", {})
    unet.load_lora_adapter(tmp_path, weight_name="a.safetensors", prefix="unet")
    networks = ours(sd, {file: 1.0})
    assert _apart(*_unet_outputs(networks["unet"], unet)) <= TOLERANCE


def test_the_base_comes_back_to_the_last_bit(xl: Path, tmp_path: Path) -> None:
    networks = base_models(xl)
    networks["unet"].half()
    before = {name: {k: v.clone() for k, v in network.state_dict().items()} for name, network in networks.items()}
    models = adaptable_models(networks)
    adapters = {}
    for seed, name in enumerate("ab"):
        write_lora(tmp_path / f"{name}.safetensors", random_updates(networks, seed, dora=name == "b"), "kohya", {})
        adapters[name] = read_lora(tmp_path / f"{name}.safetensors", models)
    adapted = AdaptedNetworks(networks, adapters)
    adapted.use({"a": 0.5, "b": 1.0})
    both = {name: value.clone() for name, value in networks["unet"].state_dict().items()}
    adapted.use({"a": 2.0})
    adapted.use({"b": 1.0, "a": 0.5})
    assert all(torch.equal(value, both[name]) for name, value in networks["unet"].state_dict().items())
    assert not torch.equal(both["conv_in.weight"], before["unet"]["conv_in.weight"])
    adapted.use({"a": 0.0})
    for name, network in networks.items():
        assert all(torch.equal(value, before[name][k]) for k, value in network.state_dict().items())


def test_adaptable_models_are_those_of_the_family(xl: Path) -> None:
    models = adaptable_models(base_models(xl))
    assert list(models) == ["unet", "text_encoder", "text_encoder_2"]
    assert all(isinstance(model, Adaptable) for model in models.values())
