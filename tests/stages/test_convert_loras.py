"""`ldm convert --merge-lora`: the merged model generates the pictures of the adapted one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm_cli.cli.app import run as ldm
from ldm_cli.core.low_rank import LowRank
from ldm_cli.errors import CheckpointError
from ldm_cli.families.adapted import AdaptedNetworks, adaptable_models, adaptable_networks
from ldm_cli.families.lora_file import write_lora
from ldm_cli.families.lora_reader import read_lora
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.model_source import load_tensors
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.convert import ConvertOptions, run
from tests.sampling.tiny import tiny_pipeline
from tests.stages.test_sample_loras import write_adapters
from tests.stages.tiny_xl import save_tiny_xl


def adapted_states(folder: Path, files: dict[Path, float]) -> dict[str, dict[str, torch.Tensor]]:
    networks = adaptable_networks(open_family(folder))
    models = adaptable_models(networks)
    adapted = AdaptedNetworks(networks, {str(file): read_lora(file, models) for file in files})
    adapted.use({str(file): weight for file, weight in files.items()})
    return {name: network.state_dict() for name, network in networks.items()}


@pytest.mark.parametrize(("is_xl", "out"), [(False, "folder"), (False, "file.safetensors"), (True, "folder")])
def test_merged_weights_are_the_adapted_ones(is_xl: bool, out: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_xl(model) if is_xl else tiny_pipeline().family.save(model)
    files = {
        write_adapters(model, tmp_path / f"{n}.safetensors", i): w for i, (n, w) in enumerate([("a", 0.7), ("b", -2)])
    }
    run(model, tmp_path / out, ConvertOptions(loras=tuple(files.items())), SilentReporter())
    if out.endswith(".safetensors"):
        with safe_open(tmp_path / out, "pt") as opened:
            assert opened.metadata()["modelspec.merged_from"] == "a.safetensors=0.7, b.safetensors=-2"
        run(tmp_path / out, tmp_path / "folder", ConvertOptions(tokenizer=model), SilentReporter())
    found = adapted_states(tmp_path / "folder", {})
    for component, state in adapted_states(model, files).items():
        for name, tensor in state.items():
            torch.testing.assert_close(found[component][name], tensor, atol=1e-6, rtol=0)
    base = open_family(model).denoiser.state_dict()
    assert not all(torch.equal(found["unet"][name], base[name]) for name in base)


def test_weights_of_another_type_are_rounded_once(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_pipeline().family.save(model)
    file = write_adapters(model, tmp_path / "a.safetensors", 0)
    run(model, tmp_path / "half", ConvertOptions(dtype="fp16"), SilentReporter())
    run(tmp_path / "half", tmp_path / "whole", ConvertOptions(dtype="fp32", loras=((file, 1.0),)), SilentReporter())
    found, expected = adapted_states(tmp_path / "whole", {}), adapted_states(tmp_path / "half", {file: 1.0})
    assert all(torch.equal(found["unet"][name], tensor) for name, tensor in expected["unet"].items())


def test_a_model_by_itself_takes_its_own_adapters(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    tiny_pipeline().family.save(model)
    file = write_adapters(model, tmp_path / "a.safetensors", 0)
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        own = tmp_path / f"{part}.safetensors"
        save_file({name: tensor for name, tensor in load_file(file).items() if name.startswith(prefix)}, own)
        run(model / part, tmp_path / "alone" / part, ConvertOptions(loras=((own, 0.5),)), SilentReporter())
        expected, plain = adapted_states(model, {own: 0.5})[part], adapted_states(model, {})[part]
        found = load_tensors(tmp_path / "alone" / part)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert any(not torch.equal(found[name], tensor) for name, tensor in plain.items())
    with pytest.raises(CheckpointError, match="do not fit the model: no such module: lora_te_text_model"):
        run(model / "unet", tmp_path / "unet", ConvertOptions(loras=((file, 1.0),)), SilentReporter())
    assert ldm(["convert", str(model), str(tmp_path / "merged"), "--merge-lora", f"{file}=0.5", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["metadata"]["modelspec.merged_from"] == "a.safetensors=0.5"


def test_a_weight_of_zero_merges_nothing_and_an_autoencoder_takes_no_adapters(tmp_path: Path) -> None:
    model, file = tmp_path / "model", tmp_path / "a.safetensors"
    family = tiny_pipeline().family
    family.save(model)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rows = len(family.denoiser.get_submodule(layer).weight)  # type: ignore[arg-type]
    update = LowRank(torch.ones(1, rows), torch.ones(rows, 1), 1.0, torch.ones(rows))
    write_lora(file, {"unet": {layer: update}}, "diffusers", {})
    run(model, tmp_path / "same", ConvertOptions(loras=((file, 0.0),)), SilentReporter())
    found = load_tensors(tmp_path / "same/unet")
    assert all(torch.equal(found[name], tensor) for name, tensor in load_tensors(model / "unet").items())
    write_lora(file, {"vae": {"post_quant_conv": LowRank(torch.ones(1, 4), torch.ones(4, 1), 1.0)}}, "diffusers", {})
    with pytest.raises(CheckpointError, match=r"no such module: vae.post_quant_conv"):
        run(model, tmp_path / "out", ConvertOptions(loras=((file, 1.0),)), SilentReporter())


@pytest.mark.parametrize(("weight", "dtype"), [(float("nan"), None), (1e9, "fp16")])
def test_weights_that_would_not_be_finite_are_not_written(weight: float, dtype: str | None, tmp_path: Path) -> None:
    tiny_pipeline().family.save(tmp_path / "model")
    file = write_adapters(tmp_path / "model", tmp_path / "a.safetensors", 0)
    with pytest.raises(CheckpointError, match="would not be finite; lower their weights"):
        run(
            tmp_path / "model", tmp_path / "out", ConvertOptions(dtype=dtype, loras=((file, weight),)), SilentReporter()
        )
    assert not (tmp_path / "out").exists()
